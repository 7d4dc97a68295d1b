"""The innermost loops: a few rows times a panel, with all sums in registers.

A tile walks down a panel once, a step of the panel at a time:

                       panel   | w0 w1 w2 w3 |  <- one step: 4 loads, in the order of memory,
        6 rows of a            | w0 w1 w2 w3 |     and 24 multiply-adds with 6 words of a
                               |     ...     |

A sum is one chain of multiply-adds down the panel, whatever the tile's height, so a row's result has the same bits alone or among
many. In a batched tile every row has a panel of its own, as heads have their own keys: what it gains is that one chain need not wait
for another, and that several panels are on their way from memory at once.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.formats import Format
from nanovllm.model.kernels.simd.vector import I64, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import WORD_BYTES


def make_tile(
    target: KernelTarget,
    numbers: Format,
    rows: int,
    vectors: int,
    *,
    ahead_lines: int,
    nontemporal: bool = False,
) -> Any:
    """tile(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead): out[rows, vectors] += a[rows, steps] @ panel[steps, vectors].

    At every step the next `ahead_lines` cache lines from `ahead` on are asked for, with `nontemporal` to be read and then forgotten.
    """

    def tile(
        v: Vectors,
        a: Value,
        a_stride: Value,
        panel: Value,
        panel_stride: Value,
        steps: Value,
        out: Value,
        out_stride: Value,
        ahead: Value,
    ) -> None:
        def ask(k: Value) -> None:
            for line in range(ahead_lines):
                v.prefetch(
                    v.address(ahead, v.times(k, ahead_lines * LINE_BYTES)),
                    line * LINE_BYTES,
                    nontemporal=nontemporal,
                )

        _walk(
            v,
            numbers,
            vectors,
            _spaced(v, a, a_stride, rows),
            [panel],
            panel_stride,
            steps,
            _spaced(v, out, out_stride, rows),
            ask,
        )

    return kernel(target, tile)


def make_batched_tile(target: KernelTarget, numbers: Format, rows: int, vectors: int) -> Any:
    """tile(a, a_stride, panel, row_stride, panel_stride, steps, out, out_stride, ahead): each row times its own panel, `row_stride` after the last.

    What is as far as `ahead` bytes from what is read is asked for, where the target wants that.
    """

    def tile(
        v: Vectors,
        a: Value,
        a_stride: Value,
        panel: Value,
        row_stride: Value,
        panel_stride: Value,
        steps: Value,
        out: Value,
        out_stride: Value,
        ahead: Value,
    ) -> None:
        panels = _spaced(v, panel, row_stride, rows)

        def ask(k: Value) -> None:
            for one in panels if target.prefetch_next_block else ():
                at = v.address(v.address(one, ahead), v.builder.mul(k, panel_stride))
                for offset in range(0, vectors * v.lanes * WORD_BYTES, LINE_BYTES):
                    v.prefetch(at, offset)

        _walk(
            v,
            numbers,
            vectors,
            _spaced(v, a, a_stride, rows),
            panels,
            panel_stride,
            steps,
            _spaced(v, out, out_stride, rows),
            ask,
        )

    return kernel(target, tile)


def _spaced(v: Vectors, base: Value, stride: Value, count: int) -> list[Value]:
    return [v.address(base, v.builder.mul(stride, I64(number))) for number in range(count)]


def _walk(
    v: Vectors,
    numbers: Format,
    vectors: int,
    rows: list[Value],
    panels: list[Value],
    panel_stride: Value,
    steps: Value,
    outs: list[Value],
    ask: Callable[[Value], None],
) -> None:
    """Emit a tile: `panels` are one for all rows or one for each, `ask(k)` what else is to be done at step k."""
    load = v.load_words if numbers.accumulates_int32 else v.load
    places = [
        (row, vector * v.lanes * WORD_BYTES)
        for row in range(len(rows))
        for vector in range(vectors)
    ]
    sums = [load(outs[row], offset) for row, offset in places]

    def step(k: Value, sums: list[Value]) -> list[Value]:
        ask(k)
        here = [v.address(panel, v.builder.mul(k, panel_stride)) for panel in panels]
        weights = {
            (panel, offset): numbers.widen(v, v.load_words(here[panel], offset))
            for panel, offset in places
            if panel < len(panels)
        }
        inputs = [
            numbers.inputs(v, v.address(row, v.times(k, numbers.input_bytes))) for row in rows
        ]
        renewed = []
        for (row, offset), total in zip(places, sums, strict=True):
            for value, weight in zip(inputs[row], weights[row % len(panels), offset], strict=True):
                total = numbers.multiply_add(v, value, weight, total)  # noqa: PLW2901 - it is what the loop is for
            renewed.append(total)
        return renewed

    for (row, offset), total in zip(places, v.loop(steps, 1, sums, step), strict=True):
        v.store(total, outs[row], offset)


def make_tiles(
    target: KernelTarget,
    numbers: Format,
    vectors: int,
    *,
    ahead_lines: int,
    nontemporal: bool = False,
) -> Any:
    """tiles(a, a_stride, panel, panel_stride, steps, out, out_stride, count, ahead): tiles down any number of rows.

    Each tile asks for lines where the one before has stopped, until as much from `ahead` on has been asked for as is being read.
    """
    t1, t2, t3, t4, t5, t6 = (
        make_tile(
            target, numbers, height, vectors, ahead_lines=ahead_lines, nontemporal=nontemporal
        )
        for height in (1, 2, 3, 4, 5, 6)
    )

    @compiled
    def tiles(
        a: int,
        a_stride: int,
        panel: int,
        panel_stride: int,
        steps: int,
        out: int,
        out_stride: int,
        count: int,
        ahead: int,
    ) -> None:
        asked = 0
        while count > 0:
            if count >= 9 or count == 6:
                rows = 6
                t6(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            elif count == 5:
                rows = 5
                t5(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            elif (
                count >= 4
            ):  # 7 and 8 rows too: 4 and 3 or 4 rather than 6 and 1 or 2, whose few chains would wait for themselves
                rows = 4
                t4(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            elif count == 3:
                rows = 3
                t3(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            elif count == 2:
                rows = 2
                t2(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            else:
                rows = 1
                t1(a, a_stride, panel, panel_stride, steps, out, out_stride, ahead + asked)
            a += rows * a_stride
            out += rows * out_stride
            count -= rows
            asked += steps * ahead_lines * LINE_BYTES
            if asked >= steps * panel_stride:
                asked = 0

    return tiles


def make_batched_tiles(target: KernelTarget, numbers: Format, vectors: int) -> Any:
    """tiles(a, a_stride, panel, row_stride, panel_stride, steps, out, out_stride, count, ahead): batched tiles down any number of rows."""
    t1, t2, t3 = (make_batched_tile(target, numbers, height, vectors) for height in (1, 2, 3))

    @compiled
    def tiles(
        a: int,
        a_stride: int,
        panel: int,
        row_stride: int,
        panel_stride: int,
        steps: int,
        out: int,
        out_stride: int,
        count: int,
        ahead: int,
    ) -> None:
        while count >= 3:
            t3(a, a_stride, panel, row_stride, panel_stride, steps, out, out_stride, ahead)
            a += 3 * a_stride
            panel += 3 * row_stride
            out += 3 * out_stride
            count -= 3
        if count == 2:
            t2(a, a_stride, panel, row_stride, panel_stride, steps, out, out_stride, ahead)
        elif count == 1:
            t1(a, a_stride, panel, row_stride, panel_stride, steps, out, out_stride, ahead)

    return tiles
