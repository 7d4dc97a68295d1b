"""Packed matrix products: rows times a weight that was laid out for them once.

    weight [d_in, d_out]  ->  panels [d_out / width][steps][width]      words of 32 bits; width = 4 vectors of 16 lanes; the rest is zeros

A step holds one float32, two bfloat16 or four int8 a column (formats.py). A tile holds 6 rows x 4 vectors of sums in registers and walks
down a panel once:

                       panel   | w0 w1 w2 w3 |  <- one step: 4 loads, in the order of memory,
        6 rows of a            | w0 w1 w2 w3 |     and 24 multiply-adds with 6 words of a
                               |     ...     |

A sum is one chain of multiply-adds down the panel, whatever the tile's height, so a row's result has the same bits alone or among
many. Few rows: every thread has panels of its own and streams them from memory, asking for what comes next while it works. Many rows:
pieces of (rows, panel) are handed out by a counter. Long panels are walked in pieces whose sums wait in memory, which changes no bit.
"""

from functools import cache
from typing import Any

from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.epilogue import make_epilogue
from nanovllm.model.kernels.formats import Format, weight_format
from nanovllm.model.kernels.layout import LINE_BYTES
from nanovllm.model.kernels.memory import make_clear
from nanovllm.model.kernels.parameters import NOTES_BYTES, ROW_BLOCK, WORD_BYTES
from nanovllm.model.kernels.target import Target
from nanovllm.model.kernels.threads import atomic_add
from nanovllm.model.kernels.vector import I64, Value, Vectors, kernel

_PANEL_STEPS = 768  # of a panel at a time: 192 KiB, which leave the second-level cache room for the rows
_STREAM_ROWS = 6  # one tile: the panel is read at the speed of memory, and asked for a little ahead of where it is used
_STREAM_BYTES = 12288  # some 250 ns of a core's share of memory
_STATIC_ROWS = 64  # up to here reading the weights costs more than computing with them


def make_tile(target: Target, numbers: Format, rows: int, vectors: int, *, ahead_lines: int) -> Any:
    """tile(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead): out[rows, vectors] += a[rows, steps] @ panel[steps, vectors].

    At every step the next `ahead_lines` cache lines from `ahead` on are asked for.
    """
    vector_bytes = target.lanes * WORD_BYTES

    def tile(
        v: Vectors, a: Value, a_stride: Value, panel: Value, panel_stride: Value, steps: Value, out: Value, out_stride: Value, ahead: Value
    ) -> None:
        load = v.load_words if numbers.sums_integers else v.load
        row_at = [v.address(a, v.builder.mul(a_stride, I64(row))) for row in range(rows)]
        out_at = [v.address(out, v.builder.mul(out_stride, I64(row))) for row in range(rows)]
        places = [(row, vector) for row in range(rows) for vector in range(vectors)]
        sums = [load(out_at[row], vector * vector_bytes) for row, vector in places]

        def step(k: Value, sums: list[Value]) -> list[Value]:
            here = v.address(panel, v.builder.mul(k, panel_stride))
            for line in range(ahead_lines):
                v.prefetch(v.address(ahead, v.times(k, ahead_lines * LINE_BYTES)), line * LINE_BYTES)
            weights = [numbers.widen(v, v.load_words(here, vector * vector_bytes)) for vector in range(vectors)]
            inputs = [numbers.inputs(v, v.address(row_at[row], v.times(k, numbers.input_bytes))) for row in range(rows)]
            renewed = []
            for (row, vector), total in zip(places, sums, strict=True):
                for value, weight in zip(inputs[row], weights[vector], strict=True):
                    total = numbers.multiply_add(v, value, weight, total)  # noqa: PLW2901 - it is what the loop is for
                renewed.append(total)
            return renewed

        for (row, vector), total in zip(places, v.loop(steps, 1, sums, step), strict=True):
            v.store(total, out_at[row], vector * vector_bytes)

    return kernel(target, tile)


def make_tiles(target: Target, numbers: Format, vectors: int, *, ahead_lines: int) -> Any:
    """tiles(a, a_stride, panel, panel_stride, steps, out, out_stride, count, ahead): tiles down any number of rows.

    Each tile asks for lines where the one before has stopped.
    """
    t1, t2, t3, t4, t5, t6 = (make_tile(target, numbers, height, vectors, ahead_lines=ahead_lines) for height in (1, 2, 3, 4, 5, 6))

    @compiled
    def tiles(a: int, a_stride: int, panel: int, panel_stride: int, steps: int, out: int, out_stride: int, count: int, ahead: int) -> None:
        while count >= 6:
            t6(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
            a += 6 * a_stride
            out += 6 * out_stride
            count -= 6
            ahead += steps * ahead_lines * LINE_BYTES
        if count == 5:
            t5(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
        elif count == 4:
            t4(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
        elif count == 3:
            t3(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
        elif count == 2:
            t2(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
        elif count == 1:
            t1(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)

    return tiles


@cache
def make_panel_sums(target: Target, weights: str) -> Any:
    """panel_sums(linear, panel, a, a_stride, count, sums): sums[count, width] of rows times one panel of a linear layer's record."""
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    numbers = weight_format(target, weights)
    step_bytes = numbers.input_bytes
    tiles = make_tiles(target, numbers, target.panel_vectors, ahead_lines=1)
    stream = make_tiles(target, numbers, target.panel_vectors, ahead_lines=width_bytes // LINE_BYTES)
    clear = make_clear(target)

    @compiled
    def panel_sums(linear: Any, panel: int, a: int, a_stride: int, count: int, sums: int) -> None:
        clear(sums, count * width)
        steps = linear.steps
        weight = linear.weight + panel * steps * width_bytes
        done = 0
        while done < steps:
            piece = min(_PANEL_STEPS, steps - done)
            here = weight + done * width_bytes
            if count <= _STREAM_ROWS:
                stream(a + done * step_bytes, a_stride, here, width_bytes, piece, sums, width_bytes, count, here + _STREAM_BYTES)
            else:
                tiles(a + done * step_bytes, a_stride, here, width_bytes, piece, sums, width_bytes, count, here + steps * width_bytes)
            done += piece

    return panel_sums


@cache
def make_product(target: Target, weights: str) -> Any:
    """product(p, linear, thread, work, a, a_stride, count, notes, out, out_stride, kind).

    This thread's share of epilogue(a @ weight + bias) for `count` rows. `linear` is a record of parameters.py; `work` is a counter that
    no other product uses; `notes` are those of the rows where they are bytes. Rows of `out` are as long as all panels together.
    """
    width = target.panel_width
    width_bytes = width * WORD_BYTES
    panel_sums = make_panel_sums(target, weights)
    epilogue = make_epilogue(target, weights)

    @compiled
    def panel_product(
        linear: Any, panel: int, a: int, a_stride: int, count: int, notes: int, out: int, out_stride: int, kind: int, sums: int
    ) -> None:
        panel_sums(linear, panel, a, a_stride, count, sums)
        for row in range(count):
            epilogue(kind, sums + row * width_bytes, linear, panel * width, out + row * out_stride, notes + row * NOTES_BYTES)

    @compiled
    def product(
        p: Any, linear: Any, thread: int, work: int, a: int, a_stride: int, count: int, notes: int, out: int, out_stride: int, kind: int
    ) -> None:
        sums = p.scratch + thread * p.scratch_bytes
        panels = linear.panels
        if count <= _STATIC_ROWS:
            for panel in range(panels * thread // p.threads, panels * (thread + 1) // p.threads):
                panel_product(linear, panel, a, a_stride, count, notes, out, out_stride, kind, sums)
            return
        row_blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
        while True:
            item = atomic_add(work, 1)
            if item >= panels * row_blocks:
                return
            row = item // panels * ROW_BLOCK
            panel_product(
                linear, item % panels, a + row * a_stride, a_stride, min(ROW_BLOCK, count - row), notes + row * NOTES_BYTES,
                out + row * out_stride, out_stride, kind, sums,
            )  # fmt: skip

    return product
