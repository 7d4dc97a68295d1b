"""Matmuls of training: C = A @ B, C = A @ B^T and C += A^T @ B, with operands of any size.

The layout is that of GotoBLAS (Goto and van de Geijn 2008, https://doi.org/10.1145/1356052.1356053).
B is packed into panels before (pack.py). The loops, from the outermost to the innermost:

    item   a block of up to BLOCK_ROWS rows of C, and a group of panels
    piece  up to MAX_PIECE steps
    panel  a few vectors of columns
    tile   6 rows of the block, with all sums in registers (simd/tile.py)
    step   one element of each row of A, and a row of the panel

Each tile prefetches the rows of A of the next one, its share of the next panel, and the rows that
it will write: they may be in the other cores' caches, or in none. The part of A that an item needs
in a piece stays in the second-level cache, and is packed where A is transposed. A sum takes its
terms in the order of the steps: those of a piece from 0, and then the sums of the pieces one after
another. How many steps a piece has depends only on the number of steps.
"""

from functools import cache
from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.memory import make_clear, make_copy
from nanovllm.model.kernels.simd.rows import rows_at
from nanovllm.model.kernels.simd.tile import TILE_ROWS, TileInput
from nanovllm.training.kernels.matmul.epilogue import make_epilogue
from nanovllm.training.kernels.matmul.pack import SLIVER_STEP_BYTES, Panels, make_pack_slivers
from nanovllm.training.kernels.matmul.tile import GROUP_STEPS, TileResult, make_tile
from nanovllm.training.kernels.phases import Work
from nanovllm.training.kernels.records import BLOCK_ROWS, IDENTITY, MAX_PIECE, SCRATCH_FLOATS

_ITEMS_PER_THREAD = 12  # so that no thread waits long for the last item
_TRANSPOSED_ITEMS_PER_THREAD = 2  # each packs its rows of A; other items follow
_TILE_BYTES = TILE_ROWS * 64 * WORD_BYTES
_SCRATCH_BYTES = SCRATCH_FLOATS * WORD_BYTES


class Matmul(NamedTuple):
    """The operands of out = f(z), z = [addend +] [bias +] A @ B; arrays are C-contiguous.

    rows                     of A and of out
    a_ptr, is_transposed     A, or its transpose, whose rows are steps
    b                        B, which has been packed
    out_ptr                  result; there are no items where this is 0
    slope_ptr                receives f'(z), and before that the sums of pieces; out_ptr where f is
                             the identity or its slopes are not needed
    kind                     number of f (records.KINDS)
    bias_ptr                 bias of each column, or 0
    addend_ptr               array like out, or out itself, or 0
    """

    rows: int
    a_ptr: int
    is_transposed: bool
    b: Panels
    out_ptr: int
    slope_ptr: int
    kind: int
    bias_ptr: int
    addend_ptr: int


def plain_matmul(
    a: str, b: Any, out: str, *, rows: str, is_transposed: bool = False, accumulates: bool = False
) -> Any:
    """Return describe(record) of the operands of out = A @ B, or out += A @ B.

    a, out, rows   names of fields of the record
    b              what `panels_of` returns
    is_transposed  as in Matmul
    accumulates    add to `out`
    """

    @compiled
    def describe(record: Any) -> Matmul:
        out_ptr = record[out]
        addend_ptr = out_ptr if accumulates else 0
        return Matmul(
            record[rows], record[a], is_transposed, b(record), out_ptr, out_ptr, IDENTITY, 0,
            addend_ptr,
        )  # fmt: skip

    return describe


@compiled
def _block_rows(rows: int) -> int:
    """Return the rows of a block: equal blocks, in whole tiles, of at most BLOCK_ROWS."""
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    return ((rows + blocks - 1) // blocks + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@compiled
def _count_blocks(rows: int) -> int:
    return (rows + _block_rows(rows) - 1) // _block_rows(rows)


@compiled
def _count_groups(product: Matmul, panels: int, threads: int) -> int:
    """Return the number of groups of panels: some items for each thread."""
    blocks = _count_blocks(product.rows)
    items = threads * (_TRANSPOSED_ITEMS_PER_THREAD if product.is_transposed else _ITEMS_PER_THREAD)
    return max(1, min(panels, (items + blocks - 1) // blocks))


def matmul_work(target: KernelTarget, describe: Any) -> Work:
    """Return the work of a matmul whose operands describe(record) returns, a Matmul."""
    width = target.panel_width
    multiply = _make_multiply(target)

    @compiled
    def count(record: Any) -> int:
        product = describe(record)
        if product.out_ptr == 0:
            return 0
        panels = (product.b.columns + width - 1) // width
        return _count_blocks(product.rows) * _count_groups(product, panels, record.threads)

    @compiled
    def compute(record: Any, thread: int, item: int) -> None:
        scratch_ptr = record.scratch_ptr + thread * _SCRATCH_BYTES
        multiply(describe(record), record.threads, item, scratch_ptr)

    return Work(count, compute)


@compiled
def _piece_steps(steps: int) -> int:
    """Return the steps of a piece: equal pieces of at most MAX_PIECE."""
    pieces = (steps + MAX_PIECE - 1) // MAX_PIECE
    return (steps + pieces - 1) // pieces


@cache
def _make_multiply(target: KernelTarget) -> Any:
    """Return multiply, which computes an item.

    product      Matmul
    threads      number of threads
    item         index of the item
    scratch_ptr  working memory of the thread, SCRATCH_FLOATS
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    tile = make_tile(target)
    epilogue = make_epilogue(target)
    pack_slivers = make_pack_slivers(target)
    first_sums = _make_first_sums(target)

    @outlined
    def multiply(product: Matmul, threads: int, item: int, scratch_ptr: int) -> None:
        columns, steps = product.b.columns, product.b.steps
        panels = (columns + width - 1) // width
        groups = _count_groups(product, panels, threads)
        group = item % groups
        first_row = item // groups * _block_rows(product.rows)
        height = min(_block_rows(product.rows), product.rows - first_row)
        row_bytes = columns * WORD_BYTES
        block_offset_bytes = first_row * row_bytes
        row_stride, step_stride = (1, product.rows) if product.is_transposed else (steps, 1)
        sums_ptr = scratch_ptr  # of a tile
        start_ptr, slivers_ptr = sums_ptr + _TILE_BYTES, sums_ptr + 2 * _TILE_BYTES
        addend_ptr = product.addend_ptr
        piece_steps = _piece_steps(steps)
        for first_step in range(0, steps, piece_steps):
            count = min(piece_steps, steps - first_step)
            a_ptr = product.a_ptr + (first_row * row_stride + first_step * step_stride) * WORD_BYTES
            a_row_bytes, a_step_bytes = row_stride * WORD_BYTES, step_stride * WORD_BYTES
            tile_a_bytes = TILE_ROWS * a_row_bytes  # from one tile's rows of A to the next
            if product.is_transposed:
                pack_slivers(a_ptr, a_step_bytes, height, count, slivers_ptr)
                a_ptr, a_row_bytes, a_step_bytes = slivers_ptr, WORD_BYTES, SLIVER_STEP_BYTES
                tile_a_bytes = count * SLIVER_STEP_BYTES
            ahead_bytes = count // GROUP_STEPS * width_bytes  # of the next panel, in a tile
            bias_ptr = product.bias_ptr
            if first_step > 0:  # the sums so far have the addend and the bias
                addend_ptr, bias_ptr = product.slope_ptr, 0
            adds = 1 if addend_ptr != 0 else 0
            kind = product.kind if first_step + count == steps else IDENTITY
            for panel in range(panels * group // groups, panels * (group + 1) // groups):
                tile_columns = min(width, columns - panel * width)
                is_direct = kind == IDENTITY and tile_columns == width
                first_ptr = first_sums(
                    bias_ptr + panel * width_bytes if bias_ptr != 0 else 0, tile_columns, start_ptr
                )
                panel_ptr = product.b.panels_ptr + (panel * steps + first_step) * width_bytes
                for row in range(0, height, TILE_ROWS):
                    tile_rows = min(TILE_ROWS, height - row)
                    offset_bytes = block_offset_bytes + row * row_bytes + panel * width_bytes
                    tile_a_ptr = a_ptr + row // TILE_ROWS * tile_a_bytes
                    slope_ptr = product.slope_ptr + offset_bytes
                    tile_addend_ptr = addend_ptr + offset_bytes if adds else slope_ptr
                    result = TileResult(slope_ptr, row_bytes, adds, tile_addend_ptr)
                    if not is_direct:
                        result = TileResult(sums_ptr, width_bytes, 0, sums_ptr)
                    tile(
                        tile_rows, TileInput(tile_a_ptr, a_row_bytes, a_step_bytes), panel_ptr,
                        count, first_ptr, result, rows_at(slope_ptr, row_bytes),
                        product.out_ptr + offset_bytes,
                        panel_ptr + steps * width_bytes + row // TILE_ROWS * ahead_bytes,
                    )  # fmt: skip
                    if not is_direct:
                        epilogue(
                            kind, adds, tile_addend_ptr, sums_ptr, tile_rows, tile_columns,
                            slope_ptr, product.out_ptr + offset_bytes, row_bytes,
                        )  # fmt: skip

    return multiply


def _make_first_sums(target: KernelTarget) -> Any:
    """Return first_sums, which returns the address of the first values of a tile's sums [width].

    bias_ptr   bias of the first column, or 0
    columns    columns that are not padding
    start_ptr  memory for values that are not in `bias`
    """
    width = target.panel_width
    clear, copy = make_clear(target), make_copy(target)

    @compiled
    def first_sums(bias_ptr: int, columns: int, start_ptr: int) -> int:
        if bias_ptr != 0 and columns == width:
            return bias_ptr
        clear(start_ptr, width)
        if bias_ptr != 0:
            copy(bias_ptr, start_ptr, columns)
        return start_ptr

    return first_sums
