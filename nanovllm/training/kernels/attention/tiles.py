"""The matmuls of attention: tiles of up to 6 rows times a panel, also along the causal diagonal.

A panel is two vectors wide. It has a row for each step, one after another in memory:

    out[rows, WIDTH] (+)= inputs[rows, steps] @ panel[steps, WIDTH]

The weights P of causal attention are a triangle. A tile of rows r, r + 1, ... on its diagonal has
some steps that all rows take, and as many steps as it has rows that only some rows take:

    TAIL: out = P @ V      row r sees the keys up to r        | x x x . . |   first all rows,
                                                              | x x x x . |   then row i takes
                                                              | x x x x x |   the steps up to i
    HEAD: grad_V = P^T @ grad_out                             | x x x x x |   row i begins
          the row of key r is used by the queries from r on   | . x x x x |   at step i
                                                              | . . x x x |

These steps are emitted one by one, without the products above the diagonal. So no time is spent
there, and a NaN of a later token does not reach an earlier one, as 0 * NaN would.
"""

from typing import Any, NamedTuple

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.training.kernels.attention.layout import PANEL_VECTORS, panel_width

_HEIGHTS = (6, 4, 2, 1)
SQUARE, HEAD, TAIL = "square", "head", "tail"


class _Kind(NamedTuple):
    """A kind of tile.

    shape       SQUARE, HEAD or TAIL
    transposed  the inputs are [steps, rows], not [rows, steps]
    accumulate  add to the result
    """

    shape: str
    transposed: bool
    accumulate: bool


def _emit_tile(
    v: Vectors, kind: _Kind, rows: int, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
    steps: Value, out_ptr: Value, out_stride_bytes: Value,
) -> None:  # fmt: skip
    """Emit out[rows, WIDTH] (+)= inputs @ panel; all rows take `steps` steps."""
    step_bytes = panel_width(v.target) * WORD_BYTES
    offsets_bytes = range(0, step_bytes, v.lanes * WORD_BYTES)

    def load_input(row: int, step: Value) -> Value:
        if kind.transposed:
            column_ptr = in_ptr + step * in_stride_bytes
            return v.load_scalar(column_ptr, row * WORD_BYTES)
        return v.load_scalar(v.element(in_ptrs[row], step))

    def multiply_add(step: Value, accumulators: list[Value], rows: range) -> list[Value]:
        """Add one step's products to the accumulators of some rows."""
        panel_row_ptr = panel_ptr + step * step_bytes
        weights = [v.load(panel_row_ptr, offset) for offset in offsets_bytes]
        updated = list(accumulators)
        for row in rows:
            value = load_input(row, step)
            for vector, weight in enumerate(weights):
                index = row * PANEL_VECTORS + vector
                updated[index] = v.fma(v.splat(value), weight, updated[index])
        return updated

    in_ptrs = [in_ptr + in_stride_bytes * row for row in range(rows)]
    out_ptrs = [out_ptr + out_stride_bytes * row for row in range(rows)]
    accumulators = [
        v.load(out_ptr, offset) if kind.accumulate else v.constant(0.0)
        for out_ptr in out_ptrs
        for offset in offsets_bytes
    ]
    first = rows if kind.shape == HEAD else 0
    for step in range(first):
        accumulators = multiply_add(v.scalar(step), accumulators, range(step + 1))
    accumulators = v.loop(
        steps,
        1,
        accumulators,
        lambda k, totals: multiply_add(k + first, totals, range(rows)),
    )
    for step in range(rows if kind.shape == TAIL else 0):
        accumulators = multiply_add(steps + step, accumulators, range(step, rows))
    for row, out_row_ptr in enumerate(out_ptrs):
        for vector, offset in enumerate(offsets_bytes):
            v.store(accumulators[row * PANEL_VECTORS + vector], out_row_ptr, offset)


def make_matmul(
    target: KernelTarget, shape: str = SQUARE, *, transposed: bool = False, accumulate: bool = False
) -> Any:
    """Return matmul: out[rows, WIDTH] (+)= inputs[rows, steps] @ panel, in tiles of some rows.

    in_ptr, in_stride_bytes    inputs, as in a tile; for HEAD from the first row's first step
    rows                       number of rows
    panel_ptr                  the panel's row of the first step
    steps                      SQUARE: of all rows; HEAD: of the first row, and one less for each
                               following row; TAIL: of the first row without its last, and one more
                               for each following row
    out_ptr, out_stride_bytes  result
    """
    kind = _Kind(shape, transposed, accumulate)

    def emit_tiles(
        v: Vectors, height: Value, in_ptr: Value, in_stride_bytes: Value, panel_ptr: Value,
        steps: Value, out_ptr: Value, out_stride_bytes: Value,
    ) -> None:  # fmt: skip
        arguments = (in_ptr, in_stride_bytes, panel_ptr, steps, out_ptr, out_stride_bytes)
        for rows in _HEIGHTS:
            with v.when(height == rows):
                _emit_tile(v, kind, rows, *arguments)

    tile = kernel(target, emit_tiles)
    is_head, is_tail = shape == HEAD, shape == TAIL
    step_bytes = panel_width(target) * WORD_BYTES

    @compiled
    def matmul(
        in_ptr: int, in_stride_bytes: int, rows: int, panel_ptr: int, steps: int,
        out_ptr: int, out_stride_bytes: int,
    ) -> None:  # fmt: skip
        while rows > 0:
            height = 6 if rows >= 6 else 4 if rows >= 4 else 2 if rows >= 2 else 1
            common = steps - height if is_head else steps
            tile(height, in_ptr, in_stride_bytes, panel_ptr, common, out_ptr, out_stride_bytes)
            in_ptr += height * (WORD_BYTES if transposed else in_stride_bytes)
            out_ptr += height * out_stride_bytes
            rows -= height
            if is_tail:
                steps += height
            if is_head:
                steps -= height
                in_ptr += height * WORD_BYTES
                panel_ptr += height * step_bytes

    return matmul
