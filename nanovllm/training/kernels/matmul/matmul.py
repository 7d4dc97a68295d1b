"""Matmuls of training: C = A @ B, C = A @ B^T and C += A^T @ B, with operands of any size.

The layout is that of GotoBLAS (Goto and van de Geijn 2008, https://doi.org/10.1145/1356052.1356053).
B is packed into panels before (pack.py). The loops, from the outermost to the innermost:

    item   a block of up to BLOCK_ROWS rows of C, and a group of panels
    piece  up to MAX_PIECE steps
    panel  a few vectors of columns
    tile   6 rows of the block, with all sums in registers (tile.py)
    step   one element of each row of A, and a row of the panel

The part of A that an item needs in a piece stays in the second-level cache, and is packed where A
is transposed. A piece of a panel stays in the first-level cache. A sum takes its terms in the order
of the steps: those of a piece from 0, and then the sums of the pieces one after another. How many
steps a piece has depends only on the number of steps.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled, outlined
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.move import make_clear, make_copy
from nanovllm.training.kernels.matmul.epilogue import make_epilogue
from nanovllm.training.kernels.matmul.pack import SLIVER_STEP_BYTES, make_pack_slivers
from nanovllm.training.kernels.matmul.tile import TILE_ROWS, make_tile
from nanovllm.training.kernels.records import BLOCK_ROWS, LINEAR, MAX_PIECE

_ITEMS_PER_THREAD = 12  # so that no thread waits long for the last item
_TRANSPOSED_ITEMS_PER_THREAD = 2  # each packs its rows of A; other items follow
_TILE_FLOATS = TILE_ROWS * 64


@compiled
def block_rows(rows: int) -> int:
    """Return the rows of a block: equal blocks, in whole tiles, of at most BLOCK_ROWS."""
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    return ((rows + blocks - 1) // blocks + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@compiled
def _count_groups(rows: int, panels: int, threads: int, transposed: bool) -> int:
    """Return the number of groups of panels: some items for each thread."""
    height = block_rows(rows)
    blocks = (rows + height - 1) // height
    items = threads * (_TRANSPOSED_ITEMS_PER_THREAD if transposed else _ITEMS_PER_THREAD)
    return max(1, min(panels, (items + blocks - 1) // blocks))


@cache
def make_matmul(target: KernelTarget) -> tuple[Any, Any]:
    """Return count_items and multiply, which computes an item.

    count_items(rows, columns, threads, transposed) is the number of items, where A is transposed or
    not. Arguments of multiply:

    threads, item            number of threads, and index of the item
    rows, columns, steps     C is [rows, columns], A [rows, steps], B [steps, columns]
    a_ptr, a_row_bytes       A, and bytes from one row to the next
    a_step_bytes             bytes from one step to the next; if not those of a float32, A is the
                             transpose of an array whose rows are steps
    panels_ptr               B as panels
    c_ptr, out_ptr, kind     results, and the activation; see epilogue.py
    bias_ptr                 added to each row if not 0 [columns]
    addend_ptr               added if not 0, C itself or another array [rows, columns]
    scratch_ptr              working memory of the thread, SCRATCH_FLOATS
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    tile = make_tile(target)
    epilogue = make_epilogue(target)
    pack_slivers = make_pack_slivers(target)
    first_sums = _make_first_sums(target)

    @compiled
    def count_items(rows: int, columns: int, threads: int, transposed: bool) -> int:
        height = block_rows(rows)
        panels = (columns + width - 1) // width
        return (rows + height - 1) // height * _count_groups(rows, panels, threads, transposed)

    @outlined
    def multiply(
        threads: int, item: int, rows: int, columns: int, steps: int,
        a_ptr: int, a_row_bytes: int, a_step_bytes: int, panels_ptr: int,
        c_ptr: int, out_ptr: int, bias_ptr: int, kind: int, addend_ptr: int, scratch_ptr: int,
    ) -> None:  # fmt: skip
        panels = (columns + width - 1) // width
        is_packed = a_step_bytes != WORD_BYTES
        groups = _count_groups(rows, panels, threads, is_packed)
        height = block_rows(rows)
        first_row, group = item // groups * height, item % groups
        height = min(height, rows - first_row)
        c_row_bytes = columns * WORD_BYTES
        a_ptr += first_row * a_row_bytes
        c_ptr += first_row * c_row_bytes
        out_ptr += first_row * c_row_bytes
        adds = addend_ptr != 0
        addend_ptr = addend_ptr + first_row * c_row_bytes if adds else c_ptr
        pieces = (steps + MAX_PIECE - 1) // MAX_PIECE
        piece_steps = (steps + pieces - 1) // pieces
        sums_ptr = scratch_ptr
        slivers_ptr = sums_ptr + 2 * _TILE_FLOATS * WORD_BYTES
        for first_step in range(0, steps, piece_steps):
            count = min(piece_steps, steps - first_step)
            tile_ptr, row_bytes, step_bytes = a_ptr, a_row_bytes, a_step_bytes
            if is_packed:
                pack_slivers(
                    a_ptr + first_step * a_step_bytes, a_step_bytes, height, count, slivers_ptr
                )
                tile_ptr, row_bytes, step_bytes = slivers_ptr, WORD_BYTES, SLIVER_STEP_BYTES
                tile_bytes = count * SLIVER_STEP_BYTES
            else:
                tile_ptr += first_step * a_step_bytes
                tile_bytes = TILE_ROWS * a_row_bytes
            if first_step > 0:
                adds, addend_ptr = True, c_ptr
            end = kind if first_step + count == steps else LINEAR
            for panel in range(panels * group // groups, panels * (group + 1) // groups):
                offset_bytes = panel * width_bytes
                tile_columns = min(width, columns - panel * width)
                is_direct = end == LINEAR and tile_columns == width
                start_ptr = first_sums(
                    bias_ptr + offset_bytes if bias_ptr != 0 and first_step == 0 else 0,
                    tile_columns, sums_ptr + _TILE_FLOATS * WORD_BYTES,
                )  # fmt: skip
                for row in range(0, height, TILE_ROWS):
                    tile_rows = min(TILE_ROWS, height - row)
                    row_offset_bytes = row * c_row_bytes + offset_bytes
                    tile_c_ptr = c_ptr + row_offset_bytes
                    tile_addend_ptr = addend_ptr + row_offset_bytes
                    tile(
                        tile_rows, tile_ptr + row // TILE_ROWS * tile_bytes, row_bytes, step_bytes,
                        panels_ptr + (panel * steps + first_step) * width_bytes, count, start_ptr,
                        tile_c_ptr if is_direct else sums_ptr,
                        c_row_bytes if is_direct else width_bytes, is_direct and adds,
                        tile_addend_ptr if is_direct else sums_ptr,
                        c_row_bytes if is_direct else width_bytes, tile_c_ptr, c_row_bytes,
                    )  # fmt: skip
                    if not is_direct:
                        epilogue(
                            end, adds, tile_addend_ptr, sums_ptr, tile_rows, tile_columns,
                            tile_c_ptr, out_ptr + row_offset_bytes, c_row_bytes,
                        )  # fmt: skip

    return count_items, multiply


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
