"""Linear layers: out = epilogue(inputs @ weight + bias), with the weight packed into panels.

    weight [d_in, d_out]  ->  panels [d_out / width][steps][width], 32-bit words

A panel holds `width` columns of the weight, a few vectors wide. A step of a panel is a row of
words, one for each column. A word holds one float32, two bfloat16 or four int8, which lie below
each other in the column (formats.py). Columns past d_out and rows past d_in are zeros.

The loops, from the outermost to the innermost:

    item   one panel and up to ROW_BLOCK input rows; the threads take one item at a time
    group  rows of the item that go through the epilogue together
    piece  up to _PIECE_STEPS steps of the panel
    tile   up to 6 rows of the group, with all accumulators in registers (tiles.py)
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

Where one tile has all rows, each weight is read once in a forward pass. A nontemporal prefetch then
keeps the weights from evicting what Python uses between two forward passes; targets where it is
slower do not use it. The cache lines of the output are prefetched too, because a write also has to
fetch its line first.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.epilogue import make_epilogue, make_prefetch_output
from nanovllm.model.kernels.forward.phase import ABORTED, end_phase
from nanovllm.model.kernels.forward.tiles import TILE_ROWS, make_tiles
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.move import linear_at, make_clear
from nanovllm.model.kernels.step_record import LINEAR, LINEARS_PER_LAYER, ROW_BLOCK, ROW_QUANT_BYTES
from nanovllm.model.kernels.threads.barrier import take_item

LINEAR_BYTES = LINEAR.itemsize
# 192 KiB with AVX-512, else 48 KiB: the rows and the next piece fit the second-level cache too.
_PIECE_STEPS = 768
_GROUP_ROWS = 2 * TILE_ROWS  # their accumulators stay in the first-level cache until the epilogue
_STREAM_BYTES = 6144  # what a core reads from memory in some 130 ns
# The tiles of an item together prefetch a whole panel, whose steps are 4 cache lines with AVX-512:
# two or three tiles 2 lines a step each, more tiles 1.
_THREE_TILES_ROWS = 3 * TILE_ROWS


@compiled
def group_rows(linear: Any, rows_left: int) -> int:
    """Return the number of rows in the next group, of `rows_left` rows of an item.

    A panel of several pieces takes up to ROW_BLOCK rows, which share each piece. A panel of one
    piece takes two tiles; a last one or two rows join them, because a tile of their own is slow.
    """
    if linear.steps <= _PIECE_STEPS and rows_left > _GROUP_ROWS + 2:
        return _GROUP_ROWS
    return min(rows_left, ROW_BLOCK)


@cache
def make_panel_accumulate(target: KernelTarget, weights: str) -> Any:
    """Return panel_accumulate: accumulators = inputs[first : first + rows] @ panel, for one group.

    linear            record of the linear layer (step_record.py)
    panel             index of the panel
    in_ptr            first input row of the item, in the type of the weights
    in_stride_bytes   bytes from one input row to the next
    first, rows       index of the group's first row in the item, and number of its rows
    all_rows          number of rows of the item, which decides what the tiles prefetch
    accumulators_ptr  result [rows, width], float32 or int32; overwritten
    next_ptr          panel of the thread's next item, to be prefetched
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_format = weight_format(target, weights)
    vectors = target.panel_vectors
    one_tile = make_tiles(
        target,
        panel_format,
        vectors,
        prefetch_lines=width_bytes // LINE_BYTES,
        nontemporal=target.nontemporal,
    )
    up_to_three_tiles = make_tiles(target, panel_format, vectors, prefetch_lines=2)
    more_tiles = make_tiles(target, panel_format, vectors, prefetch_lines=1)
    clear = make_clear(target)
    input_step_bytes, stream_steps = panel_format.input_bytes, _STREAM_BYTES // width_bytes

    @compiled
    def panel_accumulate(
        linear: Any, panel: int, in_ptr: int, in_stride_bytes: int, first: int, rows: int,
        all_rows: int, accumulators_ptr: int, next_ptr: int,
    ) -> None:  # fmt: skip
        steps_left = linear.steps
        panel_bytes = steps_left * width_bytes
        panel_ptr = linear.weight_ptr + panel * panel_bytes
        is_stream = all_rows <= TILE_ROWS
        in_ptr += first * in_stride_bytes
        # Each tile of the groups before has prefetched one line a step: continue where they ended.
        prefetched_bytes = first // TILE_ROWS * steps_left * LINE_BYTES % panel_bytes
        clear(accumulators_ptr, rows * width)
        while steps_left > 0:
            steps = min(_PIECE_STEPS, steps_left)
            # The last _STREAM_BYTES of a panel have nothing ahead of them but the next panel.
            if is_stream and steps_left > stream_steps:
                steps = min(steps, steps_left - stream_steps)
            steps_left -= steps
            prefetch_ptr = next_ptr
            if steps_left > 0:
                prefetch_ptr = panel_ptr + (_STREAM_BYTES if is_stream else steps * width_bytes)
            if is_stream:
                one_tile(
                    in_ptr, in_stride_bytes, panel_ptr, width_bytes, steps,
                    accumulators_ptr, width_bytes, rows, prefetch_ptr,
                )  # fmt: skip
            elif all_rows <= _THREE_TILES_ROWS:
                up_to_three_tiles(
                    in_ptr, in_stride_bytes, panel_ptr, width_bytes, steps,
                    accumulators_ptr, width_bytes, rows, prefetch_ptr,
                )  # fmt: skip
            else:
                more_tiles(
                    in_ptr, in_stride_bytes, panel_ptr, width_bytes, steps,
                    accumulators_ptr, width_bytes, rows, prefetch_ptr + prefetched_bytes,
                )  # fmt: skip
            panel_ptr += steps * width_bytes
            in_ptr += steps * input_step_bytes

    return panel_accumulate


@cache
def make_linear(target: KernelTarget, weights: str) -> Any:
    """Return linear, an operation (phase.py): out = epilogue(inputs @ weight + bias).

    record            arguments of the forward pass (step_record.py)
    thread            index of the calling thread
    phase             address of this operation's phase
    number            index of the linear layer: 4 for each transformer block, then the output head
    rows              number of input rows
    in_ptr            input rows in the type of the weights; record.row_quant_ptr has the scales and
                      zero points of int8 rows
    in_stride_bytes   bytes from one input row to the next
    out_ptr           output rows [panels * width], float32 or as epilogue.py says
    out_stride_bytes  bytes from one output row to the next
    epilogue          STORE, RESIDUAL or the index of an activation (epilogue.py)

    It returns the address of the next phase, or ABORTED.
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_accumulate = make_panel_accumulate(target, weights)
    apply_epilogue = make_epilogue(target, weights)
    prefetch_output = make_prefetch_output(target, weights)

    @compiled
    def linear(
        record: Any, thread: int, phase: int, number: int, rows: int, in_ptr: int,
        in_stride_bytes: int, out_ptr: int, out_stride_bytes: int, epilogue: int,
    ) -> int:  # fmt: skip
        if phase == ABORTED:
            return ABORTED
        # The records of this linear layer and of the one computed next; after the head comes the
        # first one, of the next forward pass.
        this = linear_at(record.linears_ptr + number * LINEAR_BYTES)
        is_head = number == record.layers * LINEARS_PER_LAYER
        following = linear_at(record.linears_ptr + (0 if is_head else number + 1) * LINEAR_BYTES)
        accumulators_ptr = record.scratch_ptr + thread * record.scratch_bytes
        panels, panel_bytes = this.panels, this.steps * width_bytes
        items = panels * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)
        done = 0
        item = take_item(phase)
        while item < items:
            # All panels for the first block of rows, then all panels for the next block.
            row = item // panels * ROW_BLOCK
            # The threads take items more or less in turn, so this thread's next one is predictable.
            next_item = item + record.threads
            next_ptr = this.weight_ptr + next_item % panels * panel_bytes
            if next_item >= items:
                panel = min(next_item - items, following.panels - 1)
                next_ptr = following.weight_ptr + panel * following.steps * width_bytes
            linear_panel(
                this, item % panels, min(ROW_BLOCK, rows - row),
                in_ptr + row * in_stride_bytes, in_stride_bytes,
                record.row_quant_ptr + row * ROW_QUANT_BYTES,
                out_ptr + row * out_stride_bytes, out_stride_bytes, epilogue,
                accumulators_ptr, next_ptr,
            )  # fmt: skip
            done += 1
            item = take_item(phase)
        return end_phase(record, thread, phase, done, items)

    @compiled
    def linear_panel(
        this: Any, panel: int, all_rows: int, in_ptr: int, in_stride_bytes: int, row_quant_ptr: int,
        out_ptr: int, out_stride_bytes: int, epilogue: int, accumulators_ptr: int, next_ptr: int,
    ) -> None:  # fmt: skip
        """Compute an item: one panel's columns of `all_rows` output rows, group by group.

        `in_ptr`, `row_quant_ptr` and `out_ptr` are of the item's first row.
        """
        column = panel * width
        first = 0
        while first < all_rows:
            rows = group_rows(this, all_rows - first)
            group_ptr = out_ptr + first * out_stride_bytes
            prefetch_output(epilogue, rows, column, group_ptr, out_stride_bytes)
            panel_accumulate(
                this, panel, in_ptr, in_stride_bytes, first, rows, all_rows,
                accumulators_ptr, next_ptr,
            )  # fmt: skip
            apply_epilogue(
                epilogue, accumulators_ptr, rows, this, column,
                row_quant_ptr + first * ROW_QUANT_BYTES, group_ptr, out_stride_bytes,
            )  # fmt: skip
            first += rows

    return linear
