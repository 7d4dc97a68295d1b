"""Packed matrix products: rows times a weight that was laid out for them once.

    weight [d_in, d_out]  ->  panels [d_out / width][steps][width]      words of 32 bits; width = 4 vectors of 16 lanes; the rest is zeros

A step holds one float32, two bfloat16 or four int8 a column (formats.py); tiles of rows walk down a panel (tiles.py).

Reading the weights is most of the work until there are many rows, so a thread asks for what it reads next while it computes: a little
ahead in the stream where one tile has all rows, the next piece of the panel where several tiles pass over this one, and at its last panel
the first of the product that follows, which is then on its way while the threads meet. A stream is read once; where the processor is not
slowed down by that, it is asked for in a way that does not push out of the caches what Python works with between two steps.

The items that threads take are panels; of many rows, blocks of rows of a panel. Long panels are walked in
pieces whose sums wait in memory, which changes no bit; along short ones, results are finished a few rows at a time. The lines that results
go to are asked for before these are computed, so that nobody waits for memory in order to write to it.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.forward.epilogue import make_epilogue, make_expect
from nanovllm.model.kernels.forward.tiles import make_tiles
from nanovllm.model.kernels.simd.formats import weight_format
from nanovllm.model.kernels.simd.move import make_clear
from nanovllm.model.kernels.step_record import NOTES_BYTES, ROW_BLOCK, WORD_BYTES
from nanovllm.model.kernels.threads.barrier import barrier, take_item

_PANEL_STEPS = 768  # of a panel at a time: 192 KiB, which leave the second-level cache room for the rows and for the next piece
_TILE_ROWS = 6
_GROUP_ROWS = (
    2 * _TILE_ROWS
)  # finished before their sums leave the first-level cache; of longer panels they wait in the second
_STREAM_ROWS = _TILE_ROWS  # one tile: the panel is read at the speed of memory, and asked for a little ahead of where it is used
_STREAM_BYTES = 6144  # some 130 ns of a core's share of memory
_SOME_ROWS = 18  # up to three tiles, which ask for two lines a step each to have the next piece in time; more need ask for one only
_WHOLE_ROWS = 64  # up to here reading the weights costs more than computing with them


@compiled
def group_rows(linear: Any, left: int) -> int:
    """How many of the rows that are left are finished together: two tiles; a block where panels are long; one or two more that would be left over."""
    if linear.steps <= _PANEL_STEPS and left > _GROUP_ROWS + 2:
        return _GROUP_ROWS
    return min(left, ROW_BLOCK)


@cache
def make_panel_sums(target: KernelTarget, weights: str) -> Any:
    """panel_sums(linear, panel, a, a_stride, first, rows, count, sums, following): sums[rows, width] of some rows times one panel.

    They are `rows` of `count`, from number `first` on; `linear` is a record of step_record.py; `following` is the address of what this thread
    reads next, of which each tile of six asks for its part.
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    numbers = weight_format(target, weights)
    step_bytes = numbers.input_bytes
    few = make_tiles(
        target,
        numbers,
        target.panel_vectors,
        ahead_lines=width_bytes // LINE_BYTES,
        nontemporal=target.nontemporal,
    )
    some, many = (
        make_tiles(target, numbers, target.panel_vectors, ahead_lines=lines) for lines in (2, 1)
    )
    clear = make_clear(target)
    stream_steps = _STREAM_BYTES // width_bytes

    @compiled
    def panel_sums(
        linear: Any,
        panel: int,
        a: int,
        a_stride: int,
        first: int,
        rows: int,
        count: int,
        sums: int,
        following: int,
    ) -> None:
        left = linear.steps
        here = linear.weight + panel * left * width_bytes
        streams = count <= _STREAM_ROWS
        a += first * a_stride
        asked = first // _TILE_ROWS * left * LINE_BYTES % (left * width_bytes)
        clear(sums, rows * width)
        while left > 0:
            piece = min(_PANEL_STEPS, left)
            if streams and left > stream_steps:
                piece = min(piece, left - stream_steps)
            left -= piece
            ahead = following
            if left > 0:
                ahead = here + (_STREAM_BYTES if streams else piece * width_bytes)
            if streams:
                few(a, a_stride, here, width_bytes, piece, sums, width_bytes, rows, ahead)
            elif count <= _SOME_ROWS:
                some(a, a_stride, here, width_bytes, piece, sums, width_bytes, rows, ahead)
            else:
                many(a, a_stride, here, width_bytes, piece, sums, width_bytes, rows, ahead + asked)
            here += piece * width_bytes
            a += piece * step_bytes

    return panel_sums


@cache
def make_product(target: KernelTarget, weights: str) -> Any:
    """product(p, linear, following, thread, phase, a, a_stride, count, notes, out, out_stride) -> whether to go on.

    A phase: epilogue(a @ weight + bias) for `count` rows. `linear` is a record of step_record.py and
    `following` that of the product after it; `notes` are those of the rows where they are bytes. Rows
    of `out` are at least as long as all panels together.
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_sums = make_panel_sums(target, weights)
    epilogue, expect = make_epilogue(target, weights), make_expect(target, weights)

    @compiled
    def panel_product(
        linear: Any,
        panel: int,
        a: int,
        a_stride: int,
        count: int,
        notes: int,
        out: int,
        out_stride: int,
        sums: int,
        ahead: int,
    ) -> None:
        first = 0
        while first < count:
            rows = group_rows(linear, count - first)
            expect(rows, linear, panel * width, out + first * out_stride, out_stride)
            panel_sums(linear, panel, a, a_stride, first, rows, count, sums, ahead)
            epilogue(
                sums,
                rows,
                linear,
                panel * width,
                out + first * out_stride,
                out_stride,
                notes + first * NOTES_BYTES,
            )
            first += rows

    @compiled
    def product(
        p: Any,
        linear: Any,
        following: Any,
        thread: int,
        phase: int,
        a: int,
        a_stride: int,
        count: int,
        notes: int,
        out: int,
        out_stride: int,
    ) -> bool:
        sums = p.scratch + thread * p.scratch_bytes
        panels, panel_bytes = linear.panels, linear.steps * width_bytes
        block_rows = ROW_BLOCK if count > _WHOLE_ROWS else count
        items = panels * ((count + block_rows - 1) // block_rows)
        done = 0
        item = take_item(phase)
        while item < items:
            row = item // panels * block_rows
            # The threads take items in turn, more or less.
            next_item = item + p.threads
            ahead = linear.weight + next_item % panels * panel_bytes
            if next_item >= items:
                panel = min(next_item - items, following.panels - 1)
                ahead = following.weight + panel * following.steps * width_bytes
            panel_product(
                linear, item % panels, a + row * a_stride, a_stride, min(block_rows, count - row),
                notes + row * NOTES_BYTES, out + row * out_stride, out_stride, sums, ahead,
            )  # fmt: skip
            done += 1
            item = take_item(phase)
        return barrier(p.job, phase, thread, done, items)

    return product
