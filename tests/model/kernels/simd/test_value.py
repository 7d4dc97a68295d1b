"""Operators of compiled values, against NumPy's and Python's."""

from collections.abc import Callable

import numpy as np
import pytest
from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.rows import Rows, rows_at
from nanovllm.model.kernels.simd.value import F32, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from tests.support.targets import HOST

LANES = HOST.lanes
X = np.linspace(-3.0, 5.0, LANES, dtype=np.float32)
FLOATS: list[tuple[Callable[..., Value], Callable[[np.ndarray], np.ndarray]]] = [
    (lambda v, x: 1.0 - 2.0 / (x * x + 1.0), lambda x: 1 - 2 / (x * x + 1)),
    (lambda v, x: -(x - 0.5) * 3.0, lambda x: -(x - np.float32(0.5)) * 3),
    (lambda v, x: 4.0 + x, lambda x: x + 4),
    (lambda v, x: v.where(x > 0.0, x, 7.0), lambda x: np.where(x > 0, x, np.float32(7))),
    (lambda v, x: v.where((x >= -1.0) & (x <= 2.0), 1.0, 0.0), lambda x: (x >= -1) & (x <= 2)),
    (lambda v, x: v.maximum(0.0, v.minimum(x, 3.0)), lambda x: np.clip(x, 0, 3)),
    (lambda v, x: v.where(x.is_nan(), 1.0, 0.0), np.isnan),
    (lambda v, x: v.where(x.not_below(1.0), 1.0, 0.0), lambda x: ~(x < 1)),
    (
        lambda v, x: ((x.bitcast(I32) >> 3) << 2 ^ 5 | 9).lshr(1).to_float(),
        lambda x: ((x.view(np.int32) >> 3 << 2 ^ 5 | 9).view(np.uint32) >> 1).astype(np.int32),
    ),
    (
        lambda v, x: v.where(~(v.round_int32(x) == 1), 1.0, 0.0),
        lambda x: np.rint(x) != 1,
    ),
]


@pytest.mark.parametrize("case", range(len(FLOATS)))
def test_an_operator_computes_what_numpys_does(case: int) -> None:
    emit, expected = FLOATS[case]
    x = X.copy()
    x[0] = np.nan if case in {6, 7} else x[0]

    def body(v: Vectors, in_ptr: Value, out_ptr: Value) -> None:
        v.store(emit(v, v.load(in_ptr)), out_ptr)

    run_kernel, out = kernel(HOST, body), np.zeros_like(x)

    @compiled
    def run(in_ptr: int, out_ptr: int) -> None:
        run_kernel(in_ptr, out_ptr)

    run(x.ctypes.data, out.ctypes.data)
    np.testing.assert_allclose(out, expected(x).astype(np.float32), rtol=1e-6)


def test_loops_and_rows_reach_every_element() -> None:
    """The sum of i * i over rows of different strides, with a condition inside a loop."""

    def body(v: Vectors, rows: Rows, count: Value) -> None:
        with v.range(count) as i:
            v.store(v.scalar(0.0, F32), rows.row(i))
            with v.when(i > 1):
                v.store((i * i).trunc(I32).to_float(), rows.row(i))

    fill, numbers = kernel(HOST, body), np.full((5, 3), -1.0, dtype=np.float32)

    @compiled
    def run(ptr: int, stride_bytes: int) -> None:
        fill(rows_at(ptr, stride_bytes), 5)

    run(numbers.ctypes.data, numbers.strides[0])
    np.testing.assert_array_equal(numbers[:, 0], [0, 0, 4, 9, 16])
    np.testing.assert_array_equal(numbers[:, 1:], -1)


def test_a_value_has_no_truth_when_code_is_emitted() -> None:
    value = Value(ir.IRBuilder(), I64(1))
    with pytest.raises(TypeError, match="no truth"):
        bool(value)


def test_an_operator_that_a_type_lacks_is_refused() -> None:
    with pytest.raises(AssertionError, match="no such operator"):
        Value(ir.IRBuilder(), I64(1)) / 2
