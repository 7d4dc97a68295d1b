"""Linear layers: out = epilogue(inputs @ weight + bias), with the weight packed into panels.

    weight [d_in, d_out]  ->  panels [d_out / width][steps][width], 32-bit words

A panel holds `width` columns of the weight, a few vectors wide. A step of a panel is a row of
words, one for each column. A word holds one float32, two bfloat16 or four int8, which lie below
each other in the column (formats.py). Columns past d_out and rows past d_in are zeros.

The loops, from the outermost to the innermost:

    item   one panel and a block of rows (KernelTarget.row_block); threads take one item at a time
    group  rows of the item that go through the epilogue together
    piece  up to PIECE_WORDS words of each column of the panel, fewer if the rows are few
    tile   up to 6 rows of the group, with all accumulators in registers (simd/tile.py); 16 rows
           where the CPU's tile unit multiplies (unit_tiles.py)
    step   a row of words of the panel, times one word of each input row

All tiles of a group walk down one piece, while it is in the second-level cache, before they walk
down the next one. In between, their accumulators are in the thread's scratch memory. A sum adds its
terms in the order of the steps, so pieces and tiles change none of its bits.

With few rows, reading the weights takes most of the time. So each tile also prefetches a part of
what the thread reads next:

- one tile has all rows of the item: the same panel, _STREAM_BYTES ahead, at memory speed;
- several tiles: the next piece of the panel, each tile a part of it;
- at the end of a panel: the panel of this thread's next item. After its last item that is a panel
  of the next linear layer, which arrives while the threads wait at the barrier.

Where weights are narrower than the arithmetic (formats.py), one tile widens them in registers.
Several tiles share a piece that the thread widens once, in memory of its own.

Where one tile has all rows, each weight is read once in a forward pass. A nontemporal prefetch then
keeps the weights from evicting what Python uses between two forward passes; targets where it is
slower do not use it. The cache lines of the output are prefetched too, because a write also has to
fetch its line first.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import round_up
from nanovllm.model.kernels.build.target import UNIT_STEPS, KernelTarget
from nanovllm.model.kernels.forward.epilogue import (
    make_epilogue,
    make_prefetch_output,
    make_result_bytes,
)
from nanovllm.model.kernels.forward.tiles import make_tiles
from nanovllm.model.kernels.forward.unit_tiles import make_unit_tiles
from nanovllm.model.kernels.simd.formats import Format, weight_format
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.memory import linear_at, make_clear
from nanovllm.model.kernels.simd.rows import Rows, rows_at, rows_from
from nanovllm.model.kernels.simd.tile import TILE_ROWS
from nanovllm.model.kernels.simd.tile_unit import UNIT_ROWS
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import (
    LINEAR_RECORD,
    LINEARS_PER_LAYER,
    PIECE_WORDS,
    ROW_QUANT_BYTES,
)
from nanovllm.model.kernels.threads.phase import make_phase

LINEAR_BYTES = LINEAR_RECORD.itemsize
_GROUP_ROWS = 2 * TILE_ROWS  # their accumulators stay in the first-level cache until the epilogue
_STREAM_BYTES = 6144  # what a core reads from memory in some 130 ns
# Up to so many rows, whose accumulators fit the first-level cache, take short pieces (16 KiB with
# AVX-512), which stay there too. Else each tile would read its piece from the second-level cache,
# through the same few buffers as the prefetches from memory.
_FEW_ROWS = 48
_SHORT_WORDS = 64
# The tile unit loads its weights from the first-level cache as fast as it multiplies, but not from
# the second. So with more than one tile it takes pieces of 24 KiB, however many rows there are.
_UNIT_WORDS = 96


@cache
def make_group_rows(target: KernelTarget, weights: str) -> Any:
    """Return group_rows(linear, all_rows, first) -> rows of the group that begins at row `first`.

    A panel of several pieces takes all rows of the item, which share each piece. A panel of one
    piece takes two tiles; a last one or two rows join them, because a tile of their own is slow.
    The tile unit takes all rows: its pieces are short.
    """
    uses_unit = target.uses_tiles(weights)
    piece_steps = PIECE_WORDS // weight_format(target, weights).widened_steps
    row_block = target.row_block(weights)

    @compiled
    def group_rows(linear: Any, all_rows: int, first: int) -> int:
        rows_left = min(all_rows - first, row_block)
        if uses_unit:
            return rows_left
        is_one_piece = all_rows > _FEW_ROWS and linear.steps <= piece_steps
        return _GROUP_ROWS if is_one_piece and rows_left > _GROUP_ROWS + 2 else rows_left

    return group_rows


def _tile_rows(target: KernelTarget, weights: str) -> int:
    """Return the most rows of a tile."""
    return UNIT_ROWS if target.uses_tiles(weights) else TILE_ROWS


def _stream_bytes(target: KernelTarget, weights: str) -> int:
    """Return how far ahead a stream prefetches: whole tiles where the tile unit multiplies."""
    tile_bytes = UNIT_STEPS * target.panel_width * WORD_BYTES
    return round_up(_STREAM_BYTES, tile_bytes if target.uses_tiles(weights) else 1)


def make_widen_piece(target: KernelTarget, panel_format: Format) -> Any:
    """Return widen_piece(piece, steps, out): the operands of each word, in steps of their own.

    piece  rows of words, one for each step
    steps  number of steps
    out    receives `widened_steps` rows of words for each step
    """

    def emit_widen(v: Vectors, piece: Rows, steps: Value, out: Rows) -> None:
        with v.range(steps) as step:
            first = step * panel_format.widened_steps
            for offset_bytes in range(0, target.panel_width * WORD_BYTES, v.lanes * WORD_BYTES):
                words = v.load_words(piece.row(step), offset_bytes)
                for number, operand in enumerate(panel_format.widen(v, words)):
                    v.store(operand, out.row(first + number), offset_bytes)

    return kernel(target, emit_widen)


def _make_count_steps(target: KernelTarget, weights: str) -> Any:
    """Return count_steps(steps_left, rows) -> steps of the next piece of a panel, of those left.

    `rows` are those of the item. The last `_stream_bytes` of a streamed panel are a piece of their
    own: nothing is ahead of them but the next panel. Pieces are whole tiles of the tile unit, where
    it multiplies.
    """
    uses_unit, tile_rows = target.uses_tiles(weights), _tile_rows(target, weights)
    widened_steps = weight_format(target, weights).widened_steps
    piece_steps, short_steps = (words // widened_steps for words in (PIECE_WORDS, _SHORT_WORDS))
    stream_steps = _stream_bytes(target, weights) // (target.panel_width * WORD_BYTES)
    if uses_unit:
        short_steps = _UNIT_WORDS

    @compiled
    def count_steps(steps_left: int, rows: int) -> int:
        if tile_rows < rows and (uses_unit or rows <= _FEW_ROWS):
            return min(short_steps, steps_left)
        steps = min(piece_steps, steps_left)
        if rows <= tile_rows and steps_left > stream_steps:
            steps = min(steps, steps_left - stream_steps)
        return steps

    return count_steps


@cache
def make_panel_accumulate(target: KernelTarget, weights: str) -> Any:
    """Return panel_accumulate: accumulators = inputs[first : first + rows] @ panel, for one group.

    An item's groups come in order, because the first one widens for all of them.

    linear        record of the linear layer (step_record.py)
    panel         index of the panel
    inputs        input rows of the item (KernelTarget.input_type)
    first, rows   index of the group's first row in the item, and number of its rows
    all_rows      number of rows of the item, which decides what the tiles prefetch
    accumulators  result [rows, width], float32 or int32, one after the other; overwritten
    next_ptr      panel of the thread's next item, to be prefetched
    wide_ptr      memory of the thread for a widened piece
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_format = weight_format(target, weights)
    widened, widened_steps = panel_format.widened, panel_format.widened_steps

    def tiles(piece_format: Format, lines: int, *, nontemporal: bool = False) -> Any:
        if target.uses_tiles(weights):
            return make_unit_tiles(target, weights, lines, nontemporal=nontemporal)
        return make_tiles(
            target, piece_format, target.panel_vectors, lines, nontemporal=nontemporal
        )

    # The tiles of an item together prefetch a whole panel, whose steps are 4 cache lines with
    # AVX-512: two or three tiles 2 lines a step each, more tiles 1. A step that is widened is two
    # steps of a tile.
    one_tile = tiles(panel_format, width_bytes // LINE_BYTES, nontemporal=target.nontemporal)
    up_to_three_tiles = tiles(widened or panel_format, 2 // widened_steps)
    more_tiles = tiles(widened or panel_format, 1)
    tile_rows, stream_bytes = _tile_rows(target, weights), _stream_bytes(target, weights)
    widen_piece = make_widen_piece(target, panel_format)
    is_narrow, row_block = widened is not None, target.row_block(weights)
    clear = make_clear(target)
    input_step_bytes, count_steps = panel_format.input_bytes, _make_count_steps(target, weights)

    @compiled
    def panel_accumulate(
        linear: Any, panel: int, inputs: Any, first: int, rows: int, all_rows: int,
        accumulators: Any, next_ptr: int, wide_ptr: int,
    ) -> None:  # fmt: skip
        steps_left = linear.steps
        panel_bytes = steps_left * width_bytes
        piece = rows_at(linear.weight_ptr + panel * panel_bytes, width_bytes)
        is_stream = all_rows <= tile_rows
        inputs = rows_from(inputs, first)
        # Each tile of the groups before has prefetched one line a step: continue where they ended.
        tile_bytes = steps_left * widened_steps * LINE_BYTES
        prefetched_bytes = first // tile_rows * tile_bytes % panel_bytes
        clear(accumulators.ptr, rows * width)
        while steps_left > 0:
            steps = count_steps(steps_left, all_rows)
            steps_left -= steps
            size_bytes = steps * width_bytes
            ahead_bytes = stream_bytes if is_stream else size_bytes
            prefetch_ptr = piece.ptr + ahead_bytes if steps_left > 0 else next_ptr
            tiled, tile_steps = piece, steps * widened_steps
            if is_narrow and not is_stream:
                tiled = rows_at(wide_ptr, width_bytes)
                if first % row_block == 0:
                    widen_piece(piece, steps, tiled)
            if is_stream:
                one_tile(inputs, piece, steps, accumulators, rows, prefetch_ptr, size_bytes)
            elif all_rows <= 3 * tile_rows:
                up_to_three_tiles(
                    inputs, tiled, tile_steps, accumulators, rows, prefetch_ptr, size_bytes
                )
            else:
                prefetch_ptr += prefetched_bytes
                more_tiles(inputs, tiled, tile_steps, accumulators, rows, prefetch_ptr, size_bytes)
            piece = rows_from(piece, steps)
            inputs = rows_at(inputs.ptr + steps * input_step_bytes, inputs.stride_bytes)

    return panel_accumulate


@cache
def make_linear(target: KernelTarget, weights: str) -> Any:
    """Return linear, an operation (threads/phase.py): out = epilogue(inputs @ weight + bias).

    Its arguments are:

    index     index of the linear layer: 4 for each transformer block, then the output head
    rows      number of input rows
    inputs    input rows (KernelTarget.input_type); record.row_quant_ptr has the scales and zero
              points of int8 rows
    out       output rows [panels * width], float32 or as epilogue.py says
    epilogue  STORE, RESIDUAL or the index of an activation (epilogue.py)
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_accumulate = make_panel_accumulate(target, weights)
    group_rows, row_block = make_group_rows(target, weights), target.row_block(weights)
    apply_epilogue = make_epilogue(target, weights)
    prefetch_output = make_prefetch_output(target, weights)
    result_bytes = make_result_bytes(target.input_type(weights))

    @compiled
    def count_items(
        record: Any, index: int, rows: int, _inputs: Any, _out: Any, _epilogue: int
    ) -> int:
        blocks = (rows + row_block - 1) // row_block
        return int(linear_at(record.linears_ptr + index * LINEAR_BYTES).panels * blocks)

    @compiled
    def linear(
        record: Any, thread: int, item: int, index: int, rows: int, inputs: Any, out: Any,
        epilogue: int,
    ) -> None:  # fmt: skip
        """Compute an item: one panel's columns of some output rows, group by group."""
        this = linear_at(record.linears_ptr + index * LINEAR_BYTES)
        # All panels for the first block of rows, then all panels for the next block.
        panel, row = item % this.panels, item // this.panels * row_block
        all_rows = min(row_block, rows - row)
        next_ptr = next_panel(record, index, item, rows)
        inputs, column = rows_from(inputs, row), panel * width
        row_quant_ptr = record.row_quant_ptr + row * ROW_QUANT_BYTES
        out_ptr = out.ptr + row * out.stride_bytes + column * result_bytes(epilogue)
        accumulators_ptr = record.scratch_ptr + thread * record.scratch_bytes
        accumulators = rows_at(accumulators_ptr, width_bytes)
        wide_ptr = record.wide_ptr + thread * record.wide_bytes
        first = 0
        while first < all_rows:
            count = group_rows(this, all_rows, first)
            group = rows_at(out_ptr + first * out.stride_bytes, out.stride_bytes)
            prefetch_output(epilogue, count, group)
            panel_accumulate(
                this, panel, inputs, first, count, all_rows, accumulators, next_ptr, wide_ptr
            )
            quant_ptr = row_quant_ptr + first * ROW_QUANT_BYTES
            apply_epilogue(epilogue, accumulators, count, this, column, quant_ptr, group)
            first += count

    @compiled
    def next_panel(record: Any, index: int, item: int, rows: int) -> int:
        """Return the address of the panel of this thread's next item.

        The threads take items more or less in turn, so the next one is predictable. After the last
        item of a layer comes the layer that is computed next; after the head, the first one, of the
        next forward pass.
        """
        this = linear_at(record.linears_ptr + index * LINEAR_BYTES)
        items = this.panels * ((rows + row_block - 1) // row_block)
        next_item = item + record.threads
        if next_item < items:
            return int(this.weight_ptr + next_item % this.panels * this.steps * width_bytes)
        is_head = index == record.layers * LINEARS_PER_LAYER
        following = linear_at(record.linears_ptr + (0 if is_head else index + 1) * LINEAR_BYTES)
        panel = min(next_item - items, following.panels - 1)
        return int(following.weight_ptr + panel * following.steps * width_bytes)

    return make_phase(count_items, linear)
