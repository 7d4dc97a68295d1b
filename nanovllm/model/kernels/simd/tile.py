"""The innermost loop of every matmul: up to 6 input rows times a panel, all sums in registers.

A tile walks down a panel once. A step of it is, with panels 4 vectors wide and 6 input rows:

    panel row    | w0 w1 w2 w3 |  4 vectors of words, loaded in memory order
    input row 0  | a0 |           one word of each input row, broadcast to a vector
    ...
    input row 5  | a5 |
                                  24 multiply-adds: accumulators[row][vector] += a[row] * w[vector]

An accumulator is one chain of multiply-adds down the panel, whatever the height of the tile. So a
row's result has the same bits alone and among many rows.

Every row may have a panel of its own, as every head has its own keys. Rows then share no loads, but
their chains still run in parallel, and several panels arrive from memory at once.

The inputs may be a triangle, as the weights P of causal attention are. A tile of rows r, r + 1, ...
on its diagonal has some steps that all rows take, and as many steps as it has rows that only some
rows take:

    TAIL: out = P @ V      row r sees the keys up to r        | x x x . . |   first all rows,
                                                              | x x x x . |   then row i takes
                                                              | x x x x x |   the steps up to i
    HEAD: grad_V = P^T @ grad_out                             | x x x x x |   row i begins
          the row of key r is used by the queries from r on   | . x x x x |   at step i
                                                              | . . x x x |

These steps are emitted one by one, without the products above the diagonal. So no time is spent
there, and a NaN of a later token does not reach an earlier one, as 0 * NaN would.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.simd.formats import Format
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors

TILE_ROWS = 6
"""Most rows of a tile."""
SQUARE, HEAD, TAIL = "square", "head", "tail"


class TileInput(NamedTuple):
    """Input rows: the address, and the bytes from one row and from one step to the next."""

    ptr: Any
    row_bytes: Any
    step_bytes: Any


def emit_tile(
    v: Vectors,
    panel_format: Format,
    inputs: TileInput,
    panels: Sequence[Rows],
    steps: Value,
    start: Sequence[Sequence[Value]],
    *,
    shape: str = SQUARE,
    prefetch: Callable[[Value], None] | None = None,
) -> list[list[Value]]:
    """Emit a tile and return its accumulators [rows][vectors].

    Args:
        v: emits the code.
        panel_format: type of inputs and panels.
        inputs: input rows.
        panels: the panel of all rows, or one for each row; a row of a panel is a step.
        steps: number of steps that all rows take.
        start: accumulators before the first step [rows][vectors].
        shape: SQUARE, HEAD or TAIL.
        prefetch: prefetch(k) emits the prefetches of step k.
    """
    rows, vectors = len(start), len(start[0])
    offsets_bytes = range(0, vectors * v.lanes * WORD_BYTES, v.lanes * WORD_BYTES)
    in_ptrs = [inputs.ptr + inputs.row_bytes * row for row in range(rows)]

    def add_step(k: Value, accumulators: list[Value], active: Sequence[int]) -> list[Value]:
        """Add one step's products to the accumulators of the active rows."""
        weights = [
            [panel_format.widen(v, v.load_words(panel.row(k), offset)) for offset in offsets_bytes]
            for panel in panels
        ]
        in_bytes = k * inputs.step_bytes
        operands = {row: panel_format.inputs(v, in_ptrs[row] + in_bytes) for row in active}
        updated = list(accumulators)
        for row, values in operands.items():
            for vector, row_weights in enumerate(weights[row % len(panels)]):
                index = row * vectors + vector
                for value, weight in zip(values, row_weights, strict=True):
                    updated[index] = panel_format.multiply_add(v, value, weight, updated[index])
        return updated

    def add_whole_step(k: Value, accumulators: list[Value]) -> list[Value]:
        if prefetch is not None:
            prefetch(k)
        return add_step(k + first, accumulators, range(rows))

    first = rows if shape == HEAD else 0
    accumulators = [accumulator for row in start for accumulator in row]
    for step in range(first):
        accumulators = add_step(v.scalar(step), accumulators, range(step + 1))
    accumulators = v.loop(steps, 1, accumulators, add_whole_step)
    for step in range(rows if shape == TAIL else 0):
        accumulators = add_step(steps + step, accumulators, range(step, rows))
    return [accumulators[row * vectors : (row + 1) * vectors] for row in range(rows)]
