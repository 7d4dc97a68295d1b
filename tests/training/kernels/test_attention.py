"""Compiled attention against its NumPy twin, with the same bits for any number of threads."""

import numpy as np
import pytest

from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import AttentionShape, Operations
from tests.training.kernels.comparison import check_equal, random

NUMPY: Operations = NumpyOperations()
KEY = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
CASES = [  # batch, context, heads, head_dim, dropout
    (1, 1, 1, 1, 0.0),
    (2, 37, 3, 5, 0.2),
    (1, 64, 2, 32, 0.0),
    (3, 25, 2, 80, 0.5),
    (1, 131, 2, 64, 0.1),
]


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(
    compiled: list[CompiledOperations], case: tuple[int, int, int, int, float]
) -> None:
    batch, context, heads, head_dim, dropout = case
    shape = AttentionShape(batch, context, heads, head_dim**-0.5, dropout, KEY)
    qkv = random(batch * context, 3 * heads * head_dim)
    grad_out = random(batch * context, heads * head_dim, seed=1)
    out, logsumexp = NUMPY.attention(qkv, shape)
    grad_qkv = NUMPY.attention_backward(grad_out, qkv, out, logsumexp, shape)
    forward = [list(operations.attention(qkv, shape)) for operations in compiled]
    check_equal(forward, [out, logsumexp], rtol=1e-6)
    backward = [
        [operations.attention_backward(grad_out, qkv, arrays[0], arrays[1], shape)]
        for operations, arrays in zip(compiled, forward, strict=True)
    ]
    check_equal(backward, [grad_qkv], rtol=2e-6)


@pytest.mark.parametrize("part", range(3))
def test_nan_reaches_no_earlier_token_and_no_other_sequence(
    compiled: list[CompiledOperations], part: int
) -> None:
    """A NaN in a query, a key or a value."""
    context, d_model, token = 40, 32, 50  # the second sequence's token 10
    shape = AttentionShape(3, context, 2, 0.25)
    qkv = random(3 * context, 3 * d_model)
    clean, _ = compiled[0].attention(qkv, shape)
    qkv[token, part * d_model + 3] = np.nan  # of head 0
    out, _ = compiled[1].attention(qkv, shape)
    reached = np.isnan(out)
    last = token if part == 0 else 2 * context - 1
    assert reached[token : last + 1, 3].all()
    outside = np.ones(out.shape, dtype=bool)
    outside[token : last + 1, : d_model // 2] = False
    np.testing.assert_array_equal(out[outside], clean[outside])


def test_nan_in_a_gradient_reaches_no_later_token(compiled: list[CompiledOperations]) -> None:
    context, d_model, token = 40, 32, 10
    shape = AttentionShape(1, context, 2, 0.25)
    qkv, grad_out = random(context, 3 * d_model), random(context, d_model, seed=1)
    out, logsumexp = compiled[0].attention(qkv, shape)
    clean = compiled[0].attention_backward(grad_out, qkv, out, logsumexp, shape)
    grad_out[token, 3] = np.nan
    grad_qkv = compiled[1].attention_backward(grad_out, qkv, out, logsumexp, shape)
    assert np.isnan(grad_qkv[: token + 1, 2 * d_model + 3]).all()
    np.testing.assert_array_equal(grad_qkv[token + 1 :], clean[token + 1 :])
    np.testing.assert_array_equal(grad_qkv[:token, :d_model], clean[:token, :d_model])
