"""Compiled layer normalization, embedding and dropout against their NumPy twins."""

import numpy as np
import pytest

from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import Operations
from tests.training.kernels.comparison import check_equal, random

NUMPY: Operations = NumpyOperations()
SHAPES = [(1, 1), (3, 5), (130, 48), (700, 33)]
KEY = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(compiled: list[CompiledOperations], shape: tuple[int, int]) -> None:
    x, gain, bias = 3 + random(*shape), random(shape[1], seed=1), random(shape[1], seed=2)
    expected = list(NUMPY.layer_norm(x, gain, bias, 1e-5))
    results = [list(operations.layer_norm(x, gain, bias, 1e-5)) for operations in compiled]
    check_equal(results, expected, rtol=1e-5)


@pytest.mark.parametrize("has_onto", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_backward(
    compiled: list[CompiledOperations], shape: tuple[int, int], has_onto: bool
) -> None:
    x, gain, grad_out = 3 + random(*shape), random(shape[1], seed=1), random(*shape, seed=2)
    _, mean, inverse = NUMPY.layer_norm(x, gain, gain, 1e-5)
    results = []
    for operations in (NUMPY, *compiled):
        grad_gain, grad_bias = random(shape[1], seed=3), random(shape[1], seed=4)
        onto = random(*shape, seed=5) if has_onto else None
        grad_x = operations.layer_norm_backward(
            grad_out, x, gain, mean, inverse, grad_gain, grad_bias, onto
        )
        results.append([grad_x, grad_gain, grad_bias])
    check_equal(results[1:], results[0], rtol=1e-5)


def test_nan_stays_in_its_row(compiled: list[CompiledOperations]) -> None:
    x = random(200, 33)
    x[100, 32] = np.nan
    for operations in compiled:
        out, _, _ = operations.layer_norm(x, np.ones(33, np.float32), np.zeros(33, np.float32), 0.1)
        np.testing.assert_array_equal(np.isnan(out).any(axis=1), np.arange(200) == 100)


@pytest.mark.parametrize(("batch", "context", "d_model"), [(1, 1, 1), (3, 7, 33), (5, 40, 100)])
@pytest.mark.parametrize("is_learned", [True, False])
def test_embed(
    compiled: list[CompiledOperations], batch: int, context: int, d_model: int, is_learned: bool
) -> None:
    tokens = np.random.default_rng(0).integers(0, 11, (batch, context))
    embeddings = random(11, d_model), random(context + 2, d_model, seed=1)
    expected = NUMPY.embed(tokens, *embeddings)
    check_equal([[each.embed(tokens, *embeddings)] for each in compiled], [expected], rtol=1e-7)
    results = []
    for operations in (NUMPY, *compiled):
        grads = [random(11, d_model, seed=2), random(context + 2, d_model, seed=3)]
        grad_out = random(batch * context, d_model, seed=4)
        operations.embed_backward(grad_out, tokens, grads[0], grads[1] if is_learned else None)
        results.append(grads)
    check_equal(results[1:], results[0], rtol=1e-6)


@pytest.mark.parametrize("token", [-1, 11])
def test_token_outside_the_vocabulary_is_refused(
    compiled: list[CompiledOperations], token: int
) -> None:
    table, tokens = random(11, 4), np.array([[1, token]])
    with pytest.raises(IndexError, match="vocabulary of 11 tokens"):
        compiled[0].embed(tokens, table, table)
    with pytest.raises(IndexError, match="vocabulary of 11 tokens"):
        compiled[0].embed_backward(random(2, 4), tokens, table, None)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (300, 333)])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.999])
def test_dropout_has_the_bits_of_numpy(
    compiled: list[CompiledOperations], shape: tuple[int, int], rate: float
) -> None:
    residual, x = random(*shape), random(*shape, seed=1)
    for operations in compiled:
        np.testing.assert_array_equal(operations.dropout(x, rate, KEY), NUMPY.dropout(x, rate, KEY))
        np.testing.assert_array_equal(
            operations.dropout(x, rate, KEY, residual),
            NUMPY.dropout(x, rate, KEY, residual),
        )
