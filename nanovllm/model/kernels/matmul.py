"""Packed matrix products: rows times a weight that was laid out for them once.

    weight [d_in, d_out]  ->  panels [d_out / width][d_in][width]      width = 4 vectors of 16 lanes; the last panel is filled with zeros

A tile holds 6 rows x 4 vectors of sums in registers and walks down a panel once:

                       panel   | w0 w1 w2 w3 |  <- one step: 4 loads, in the order of memory,
        6 rows of a            | w0 w1 w2 w3 |     and 24 multiply-adds with 6 numbers of a
                               |     ...     |

A sum is one chain of fused multiply-adds down the panel, whatever the tile's height, so a row's result has the same bits alone or among
many. Few rows: every thread has panels of its own and streams them from memory, asking for the next panel while it works. Many rows:
pieces of (rows, panel) are handed out by a counter. Long panels are walked in pieces whose sums wait in memory, which changes no bit.
"""

from typing import Any

from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.epilogue import make_epilogue
from nanovllm.model.kernels.layout import F32_BYTES, LINE_BYTES
from nanovllm.model.kernels.machine import panel_vectors, panel_width
from nanovllm.model.kernels.memory import make_clear
from nanovllm.model.kernels.parameters import ROW_BLOCK
from nanovllm.model.kernels.threads import atomic_add
from nanovllm.model.kernels.vector import I64, Value, Vectors, kernel

_PANEL_STEPS = 768  # of a panel at a time: 192 KiB of float32, which leave the second-level cache room for the rows
_STATIC_ROWS = 64  # up to here reading the weights costs more than computing with them


def make_tile(lanes: int, rows: int, vectors: int, *, prefetch: bool) -> Any:
    """tile(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead): out[rows, vectors] += a[rows, steps] @ panel[steps, vectors].

    With `prefetch`, one cache line from `ahead` on is asked for at every step.
    """
    width_bytes = lanes * F32_BYTES

    def tile(
        v: Vectors, a: Value, a_stride: Value, panel: Value, panel_stride: Value, steps: Value, out: Value, out_stride: Value, ahead: Value
    ) -> None:
        row_at = [v.address(a, v.builder.mul(a_stride, I64(row))) for row in range(rows)]
        out_at = [v.address(out, v.builder.mul(out_stride, I64(row))) for row in range(rows)]
        places = [(row, vector) for row in range(rows) for vector in range(vectors)]
        sums = [v.load(out_at[row], vector * width_bytes) for row, vector in places]

        def step(k: Value, sums: list[Value]) -> list[Value]:
            here = v.address(panel, v.builder.mul(k, panel_stride))
            if prefetch:
                v.prefetch(v.address(ahead, v.times(k, LINE_BYTES)))
            weights = [v.load(here, vector * width_bytes) for vector in range(vectors)]
            inputs = [v.splat(v.load_scalar(v.element(row_at[row], k))) for row in range(rows)]
            return [v.fma(inputs[row], weights[vector], total) for (row, vector), total in zip(places, sums, strict=True)]

        for (row, vector), total in zip(places, v.loop(steps, 1, sums, step), strict=True):
            v.store(total, out_at[row], vector * width_bytes)

    return kernel(lanes, tile)


def make_tiles(lanes: int, vectors: int, *, prefetch: bool) -> Any:
    """tiles(a, a_stride, panel, panel_stride, steps, out, out_stride, count, ahead): tiles down any number of rows."""
    t1, t2, t3, t4, t5, t6 = (make_tile(lanes, height, vectors, prefetch=prefetch) for height in (1, 2, 3, 4, 5, 6))

    @compiled
    def tiles(a: int, a_stride: int, panel: int, panel_stride: int, steps: int, out: int, out_stride: int, count: int, ahead: int) -> None:
        while count >= 6:
            t6(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead)
            a += 6 * a_stride
            out += 6 * out_stride
            count -= 6
            ahead += steps * LINE_BYTES
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


def make_product(lanes: int) -> Any:
    """product(thread, threads, work, a, a_stride, count, weight, d_in, d_out, bias, out, out_stride, kind, scratch).

    This thread's share of epilogue(a @ weight, bias); `work` is a counter that no other product uses, `scratch` memory of this thread.
    Rows of `out` and `bias` are as long as all panels together.
    """
    width = panel_width(lanes)
    width_bytes = width * F32_BYTES
    tiles = make_tiles(lanes, panel_vectors(lanes), prefetch=True)
    epilogue = make_epilogue(lanes)
    clear = make_clear(lanes)

    @compiled
    def panel_product(
        a: int, a_stride: int, count: int, panel: int, d_in: int, bias: int, out: int, out_stride: int, kind: int, scratch: int
    ) -> None:
        clear(scratch, count * width)
        done = 0
        while done < d_in:
            steps = min(_PANEL_STEPS, d_in - done)
            here = panel + done * width_bytes
            tiles(a + done * F32_BYTES, a_stride, here, width_bytes, steps, scratch, width_bytes, count, here + d_in * width_bytes)
            done += steps
        for row in range(count):
            epilogue(kind, scratch + row * width_bytes, bias, out + row * out_stride, width)

    @compiled
    def product(
        thread: int, threads: int, work: int, a: int, a_stride: int, count: int, weight: int, d_in: int, d_out: int, bias: int, out: int,
        out_stride: int, kind: int, scratch: int,
    ) -> None:  # fmt: skip
        panels = (d_out + width - 1) // width
        panel_bytes = d_in * width_bytes
        if count <= _STATIC_ROWS:
            for panel in range(panels * thread // threads, panels * (thread + 1) // threads):
                column = panel * width_bytes
                panel_product(a, a_stride, count, weight + panel * panel_bytes, d_in, bias + column, out + column, out_stride, kind, scratch)
            return
        row_blocks = (count + ROW_BLOCK - 1) // ROW_BLOCK
        while True:
            item = atomic_add(work, 1)
            if item >= panels * row_blocks:
                return
            row = item // panels * ROW_BLOCK
            panel = item % panels
            column = panel * width_bytes
            panel_product(
                a + row * a_stride, a_stride, min(ROW_BLOCK, count - row), weight + panel * panel_bytes, d_in, bias + column,
                out + row * out_stride + column, out_stride, kind, scratch,
            )  # fmt: skip

    return product
