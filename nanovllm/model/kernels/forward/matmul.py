"""Linear layers: out = epilogue(inputs @ weight + bias), with the weight packed into panels.

    weight [d_in, d_out]  ->  panels [d_out / width][steps][width], words of 32 bits

A panel is `width` columns of the weight, a few vectors wide. A step of it is a row of words, which
hold one float32, two bfloat16 or four int8 of each column (formats.py). The rest is zeros. A tile
of up to 6 input rows walks down a panel and keeps its accumulators in registers (tiles.py).

The threads take panels in turn. Of many input rows, they take blocks of ROW_BLOCK rows of a panel.
A tile first walks down one piece of a long panel with all rows, while the piece is in the cache,
and leaves its accumulators in memory. This changes no bit: a sum still adds its terms in the same
order.

Until there are many rows, reading the weights takes most of the time. So a thread prefetches what
it reads next while it computes:

- one tile has all rows: a little ahead in the same panel, which is then read at memory speed;
- several tiles: the next piece of the panel, each tile a part of it;
- at the end of a panel: this thread's next panel. After its last panel that is a panel of the next
  linear layer, which arrives while the threads wait at the barrier.

A weight is read once a step. A nontemporal prefetch keeps it from evicting what Python uses between
two steps. Targets where that is slower do not use it. The cache lines of the output are prefetched
too, because a write also has to fetch its line first.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.epilogue import make_epilogue, make_prefetch_output
from nanovllm.model.kernels.forward.phase import ABORTED, end_phase
from nanovllm.model.kernels.forward.tiles import TILE_ROWS, make_tiles
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.move import linear_at, make_clear
from nanovllm.model.kernels.step_record import (
    LINEAR,
    LINEARS_PER_LAYER,
    ROW_BLOCK,
    ROW_QUANT_BYTES,
    WORD_BYTES,
)
from nanovllm.model.kernels.threads.barrier import take_item

LINEAR_BYTES = LINEAR.itemsize
_PIECE_STEPS = 768  # 192 KiB: the second-level cache also holds the rows and the next piece
_GROUP_ROWS = 2 * TILE_ROWS  # accumulators that stay in the first-level cache until the epilogue
_STREAM_BYTES = 6144  # how far ahead one tile prefetches: some 130 ns of a core's memory bandwidth
_THREE_TILES_ROWS = 3 * TILE_ROWS  # up to here a tile must prefetch 2 lines a step, then 1 will do
_UNDIVIDED_ROWS = 64  # up to here reading the weights costs more than computing with them


@compiled
def group_rows(linear: Any, rows_left: int) -> int:
    """Return how many of the rows that are left go through the epilogue together.

    Two tiles, or a whole block where panels are long. One or two rows are not left over.
    """
    if linear.steps <= _PIECE_STEPS and rows_left > _GROUP_ROWS + 2:
        return _GROUP_ROWS
    return min(rows_left, ROW_BLOCK)


@cache
def make_panel_accumulate(target: KernelTarget, weights: str) -> Any:
    """Return panel_accumulate, the matmul of some rows with one panel.

    linear            record of the linear layer (step_record.py)
    panel             number of the panel
    in_ptr            the matmul's first input row
    in_stride_bytes   bytes from one input row to the next
    first, rows       the rows to compute: `rows` rows from number `first` on
    all_rows          rows that the matmul has in all
    accumulators_ptr  result [rows, width], float32 or int32
    next_ptr          what this thread reads after the panel; every tile prefetches a part of it
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
    step_bytes, stream_steps = panel_format.input_bytes, _STREAM_BYTES // width_bytes

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
        # The tiles of the rows before `first` have prefetched so much of the next piece already.
        prefetched_bytes = first // TILE_ROWS * steps_left * LINE_BYTES % panel_bytes
        clear(accumulators_ptr, rows * width)
        while steps_left > 0:
            steps = min(_PIECE_STEPS, steps_left)
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
            in_ptr += steps * step_bytes

    return panel_accumulate


@cache
def make_linear(target: KernelTarget, weights: str) -> Any:
    """Return linear, an operation (phase.py): out = epilogue(inputs @ weight + bias).

    record            record of the step (step_record.py)
    thread            number of the calling thread
    phase             this operation's phase
    number            number of the linear layer, counted through all blocks
    rows              number of input rows
    in_ptr            input rows in the type of the weights; int8 with their `row_quant`
    in_stride_bytes   bytes from one input row to the next
    out_ptr           output rows, each as long as all panels together
    out_stride_bytes  bytes from one output row to the next
    epilogue          STORE, RESIDUAL or the number of an activation (epilogue.py)

    It returns the next phase.
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_accumulate = make_panel_accumulate(target, weights)
    finish, prefetch_output = make_epilogue(target, weights), make_prefetch_output(target, weights)

    @compiled
    def linear(
        record: Any, thread: int, phase: int, number: int, rows: int, in_ptr: int,
        in_stride_bytes: int, out_ptr: int, out_stride_bytes: int, epilogue: int,
    ) -> int:  # fmt: skip
        if phase == ABORTED:
            return ABORTED
        this = linear_at(record.linears_ptr + number * LINEAR_BYTES)
        is_head = number == record.layers * LINEARS_PER_LAYER
        following = linear_at(record.linears_ptr + (0 if is_head else number + 1) * LINEAR_BYTES)
        accumulators_ptr = record.scratch_ptr + thread * record.scratch_bytes
        panels, panel_bytes = this.panels, this.steps * width_bytes
        block_rows = ROW_BLOCK if rows > _UNDIVIDED_ROWS else rows
        items = panels * ((rows + block_rows - 1) // block_rows)
        done = 0
        item = take_item(phase)
        while item < items:
            row = item // panels * block_rows
            # The threads take items more or less in turn, so this thread's next one is predictable.
            next_item = item + record.threads
            next_ptr = this.weight_ptr + next_item % panels * panel_bytes
            if next_item >= items:
                panel = min(next_item - items, following.panels - 1)
                next_ptr = following.weight_ptr + panel * following.steps * width_bytes
            linear_panel(
                this, item % panels, min(block_rows, rows - row),
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
        """Compute one panel's columns of the output, group by group of rows."""
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
            finish(
                epilogue, accumulators_ptr, rows, this, column,
                row_quant_ptr + first * ROW_QUANT_BYTES, group_ptr, out_stride_bytes,
            )  # fmt: skip
            first += rows

    return linear
