"""Every gradient of operations.py against central differences in float64."""

import numpy as np
import pytest

from nanovllm.training.network.dropout import MAX_ELEMENTS, keep_mask, mix, site_key
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import IGNORED, AdamWStep, AttentionShape
from tests.support.gradients import numeric_gradient

OPERATIONS = NumpyOperations()
TOLERANCE = 1e-7


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(size=shape)


@pytest.mark.parametrize("activation", ["linear", "gelu_new", "silu"])
def test_linear(activation: str) -> None:
    x, weight, bias, grad_out = normal(7, 5), normal(5, 4), normal(4), normal(7, 4)

    def weighted_sum() -> float:
        return float((OPERATIONS.linear(x, weight, bias, activation)[0] * grad_out).sum())

    _, slope = OPERATIONS.linear(x, weight, bias, activation)
    grad_weight, grad_bias = np.ones_like(weight), np.ones_like(bias)  # gradients are added
    grad_x = OPERATIONS.linear_backward(grad_out.copy(), x, weight, slope, grad_weight, grad_bias)
    np.testing.assert_allclose(grad_x, numeric_gradient(weighted_sum, x), atol=TOLERANCE)
    np.testing.assert_allclose(
        grad_weight - 1.0, numeric_gradient(weighted_sum, weight), atol=TOLERANCE
    )
    np.testing.assert_allclose(
        grad_bias - 1.0, numeric_gradient(weighted_sum, bias), atol=TOLERANCE
    )


def test_layer_norm() -> None:
    x, gain, bias, grad_out = normal(6, 8), normal(8), normal(8, seed=1), normal(6, 8, seed=1)

    def weighted_sum() -> float:
        return float((OPERATIONS.layer_norm(x, gain, bias, 1e-5)[0] * grad_out).sum())

    _, mean, inverse = OPERATIONS.layer_norm(x, gain, bias, 1e-5)
    grad_gain, grad_bias, onto = np.zeros(8), np.zeros(8), normal(6, 8, seed=2)
    before = onto.copy()
    grad_x = OPERATIONS.layer_norm_backward(
        grad_out, x, gain, mean, inverse, grad_gain, grad_bias, onto
    )
    np.testing.assert_allclose(grad_x - before, numeric_gradient(weighted_sum, x), atol=TOLERANCE)
    np.testing.assert_allclose(grad_gain, numeric_gradient(weighted_sum, gain), atol=TOLERANCE)
    np.testing.assert_allclose(grad_bias, numeric_gradient(weighted_sum, bias), atol=TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention(dropout: float) -> None:
    shape = AttentionShape(2, 5, 3, 0.5, dropout, key=site_key(1, 2, 0, 3))
    qkv, grad_out = normal(10, 36), normal(10, 12)

    def weighted_sum() -> float:
        return float((OPERATIONS.attention(qkv, shape)[0] * grad_out).sum())

    out, logsumexp = OPERATIONS.attention(qkv, shape)
    gradient = OPERATIONS.attention_backward(grad_out, qkv, out, logsumexp, shape)
    np.testing.assert_allclose(gradient, numeric_gradient(weighted_sum, qkv), atol=TOLERANCE)


def test_no_token_attends_to_a_later_one() -> None:
    shape = AttentionShape(1, 6, 2, 0.7)
    qkv = normal(6, 12)
    before = OPERATIONS.attention(qkv, shape)[0]
    qkv[4:] += 1.0
    after = OPERATIONS.attention(qkv, shape)[0]
    np.testing.assert_array_equal(after[:4], before[:4])
    assert np.abs(after[4:] - before[4:]).max() > 0.1


def test_embedding() -> None:
    token_ids = np.array([[0, 3, 3], [2, 0, 3]])
    tokens, positions, grad_out = normal(5, 4), normal(4, 4), normal(6, 4)

    def weighted_sum() -> float:
        return float((OPERATIONS.embed(token_ids, tokens, positions) * grad_out).sum())

    grad_tokens, grad_positions = np.zeros_like(tokens), np.zeros_like(positions)
    OPERATIONS.embed_backward(grad_out, token_ids, grad_tokens, grad_positions)
    np.testing.assert_allclose(grad_tokens, numeric_gradient(weighted_sum, tokens), atol=TOLERANCE)
    np.testing.assert_allclose(
        grad_positions, numeric_gradient(weighted_sum, positions), atol=TOLERANCE
    )


@pytest.mark.parametrize("rows", [7, 600])
def test_cross_entropy(rows: int) -> None:
    """600 rows are three chunks."""
    hidden, head = normal(rows, 6), normal(9, 6)
    targets = np.random.default_rng(0).integers(0, 9, rows)
    kept = np.arange(rows) % 3 > 0
    targets[~kept] = IGNORED
    grad_head = np.zeros_like(head)
    total, grad_hidden = OPERATIONS.cross_entropy(hidden, head, targets, 0.25, grad_head)
    assert grad_hidden is not None
    logits = hidden @ head.T
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_softmax[kept, targets[kept]].sum()
    assert total == pytest.approx(expected, rel=1e-12)
    without, none = OPERATIONS.cross_entropy(hidden, head, targets)
    assert none is None
    assert without == pytest.approx(total, rel=1e-12)

    def scaled() -> float:
        return 0.25 * OPERATIONS.cross_entropy(hidden, head, targets)[0]

    np.testing.assert_allclose(grad_head, numeric_gradient(scaled, head), atol=1e-6)
    some = hidden[:7]
    np.testing.assert_allclose(grad_hidden[:7], numeric_gradient(scaled, some), atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    hidden, head = np.array([[1e4, 0.0]]), np.array([[1.0, 0.0], [-1.0, 0.0]])
    total, grad = OPERATIONS.cross_entropy(hidden, head, np.array([1]), 1.0, np.zeros_like(head))
    assert grad is not None
    assert total == pytest.approx(2e4)
    np.testing.assert_allclose(grad, [[2.0, 0.0]])


def test_dropout_keeps_the_mean_and_is_its_own_backward_pass() -> None:
    x = np.ones((200, 100))
    out = OPERATIONS.dropout(x, 0.3, site_key(0, 0, 0, 0))
    assert set(np.unique(out)) == {0.0, 1.0 / 0.7}
    assert abs((out == 0.0).mean() - 0.3) < 0.01
    np.testing.assert_array_equal(OPERATIONS.dropout(x, 0.3, site_key(0, 0, 0, 0)), out)
    assert (OPERATIONS.dropout(x, 0.3, site_key(0, 1, 0, 0)) != out).mean() > 0.3
    np.testing.assert_array_equal(
        OPERATIONS.dropout(x, 0.3, site_key(0, 0, 0, 0), residual=x), 1.0 + out
    )


def test_masks_of_neighbouring_keys_and_elements_are_uncorrelated() -> None:
    keys = np.array([0, 1, 2, 1 << 32, (1 << 32) + 1], dtype=np.uint64)[:, None]
    masks = np.stack([keep_mask(key, 0.5, (4096,)) for key in keys])
    correlations = np.corrcoef(masks.astype(float))
    assert np.abs(correlations - np.eye(len(masks))).max() < 0.08
    assert abs(np.corrcoef(masks[0, 1:], masks[0, :-1])[0, 1]) < 0.08


def test_the_mixer_is_lowbias32() -> None:
    """Values computed by the published C function."""
    assert mix(np.array([0, 1, 0xFFFFFFFF], dtype=np.uint32)).tolist() == [
        0,
        _lowbias32(1),
        _lowbias32(0xFFFFFFFF),
    ]
    assert MAX_ELEMENTS == 1 << 32


def _lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def test_adamw_updates_as_its_paper_says() -> None:
    """Two updates of one parameter, by the formulas with plain numbers."""
    parameters, gradients = np.array([0.5]), np.array([0.2])
    first, second = np.zeros(1), np.zeros(1)
    p, m, v = 0.5, 0.0, 0.0
    for step, gradient in ((1, 0.2), (2, -0.4)):
        gradients[:] = gradient
        settings = AdamWStep(step, 0.01, 0.1, 0.9, 0.99, 1e-8, 0.5)
        OPERATIONS.adamw(parameters, gradients, first, second, settings)
        g = 0.5 * gradient
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)) ** 0.5 + 1e-8)
        p -= 0.01 * (update + 0.1 * p)
        assert parameters[0] == pytest.approx(p, rel=1e-12)
        assert gradients[0] == 0.0
