"""Every compiled operation against its NumPy twin, with the same bits for any number of threads."""

import inspect

import numpy as np
import pytest

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import IGNORED, AdamWStep, Operations
from tests.training.kernels.comparison import check_equal, random

NUMPY: Operations = NumpyOperations()

pytestmark = pytest.mark.slow(25)


def test_both_classes_implement_all_operations() -> None:
    """With the same parameters; nothing is inherited, so nothing runs in NumPy unnoticed."""
    interface = {name: value for name, value in vars(Operations).items() if name[0] != "_"}
    assert len(interface) == 14
    for implementation in (NumpyOperations, CompiledOperations):
        for name, method in interface.items():
            own = inspect.signature(vars(implementation)[name])
            assert list(own.parameters) == list(inspect.signature(method).parameters)


SHAPES = [(1, 1, 1), (5, 7, 3), (96, 32, 48), (203, 130, 49), (400, 16, 35), (33, 801, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["gelu_new", "linear"])
def test_linear(
    compiled: list[CompiledOperations], shape: tuple[int, int, int], activation: str
) -> None:
    rows, d_in, d_out = shape
    x, weight, bias = random(rows, d_in), random(d_in, d_out, seed=1), random(d_out, seed=2)
    weight /= d_in**0.5
    residual = random(rows, d_out, seed=3) if activation == "linear" else None
    results = []
    for operations in (NUMPY, *compiled):
        outputs = operations.linear(x, weight, bias, activation, residual)
        assert (outputs[1] is None) == (activation == "linear")
        results.append([output for output in outputs if output is not None])
    check_equal(results[1:], results[0], rtol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_slope", [True, False])
def test_linear_backward(
    compiled: list[CompiledOperations], shape: tuple[int, int, int], has_slope: bool
) -> None:
    rows, d_in, d_out = shape
    results = []
    for operations in (NUMPY, *compiled):
        grad_out, x, weight = random(rows, d_out), random(rows, d_in, seed=1), random(d_in, d_out)
        grad_weight, grad_bias = random(d_in, d_out, seed=3), random(d_out, seed=4)
        slope = random(rows, d_out, seed=5) if has_slope else None
        grad_x = operations.linear_backward(grad_out, x, weight, slope, grad_weight, grad_bias)
        results.append([grad_x, grad_weight, grad_bias])
    check_equal(results[1:], results[0], rtol=3e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(compiled: list[CompiledOperations], activation: str) -> None:
    """Values from the flat parts of each function to its steep ones, and values that are none."""
    far = [100.0, 1e20, np.inf]
    x = np.array([*np.linspace(-12.0, 12.0, 995), 0.0, *far, *np.negative(far), np.nan])
    x = x.astype(np.float32)[:, None]
    one, zero = np.ones((1, 1), dtype=np.float32), np.zeros(1, dtype=np.float32)
    with np.errstate(all="ignore"):
        expected, expected_slope = NUMPY.linear(x, one, zero, activation)
    out, slope = compiled[0].linear(x, one, zero, activation)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)
    if slope is None or expected_slope is None:
        assert slope is expected_slope
        return
    np.testing.assert_allclose(slope, expected_slope, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(5, 7, 3), (203, 801, 49)])
def test_without_a_backward_pass_there_is_no_slope(
    compiled: list[CompiledOperations], shape: tuple[int, int, int]
) -> None:
    """The bits are those with a slope; the sums of 801 steps are in the result's memory."""
    rows, d_in, d_out = shape
    arguments = (random(rows, d_in), random(d_in, d_out, seed=1), random(d_out, seed=2), "gelu_new")
    for operations in (NUMPY, *compiled):
        with_slope, slope = operations.linear(*arguments)
        without, none = operations.linear(*arguments, needs_slope=False)
        assert slope is not None
        assert none is None
        np.testing.assert_array_equal(without, with_slope)


def test_a_residual_is_added_without_an_activation_only(
    compiled: list[CompiledOperations],
) -> None:
    x = random(2, 3)
    weight, bias = random(3, 3), random(3)
    for operations in (NUMPY, compiled[0]):
        with pytest.raises(AssertionError, match="to no activation, not to gelu_new"):
            operations.linear(x, weight, bias, "gelu_new", x)


def test_sequences_fit_the_positions(compiled: list[CompiledOperations]) -> None:
    """A longer sequence is refused before an address beyond the arrays is computed."""
    token_ids, tokens = np.zeros((2, 5), np.int64), random(7, 4)
    with pytest.raises(IndexError, match="sequences have 5 tokens, but there are 4 positions"):
        compiled[0].embed(token_ids, tokens, random(4, 4))
    with pytest.raises(IndexError, match="there are 3 positions"):
        compiled[0].embed_backward(random(10, 4), token_ids, tokens, random(3, 4))


@pytest.mark.parametrize("shape", [(1, 5, 3), (37, 33, 65), (500, 20, 3001)])
def test_cross_entropy(compiled: list[CompiledOperations], shape: tuple[int, int, int]) -> None:
    """The last shape has several chunks of rows."""
    rows, d_model, vocab = shape
    hidden, head = random(rows, d_model), random(vocab, d_model, seed=1)
    targets = np.random.default_rng(2).integers(0, vocab, rows)
    losses, results = [], []
    for operations in (NUMPY, *compiled):
        grad_head = random(vocab, d_model, seed=3)
        loss, grad_hidden = operations.cross_entropy(hidden, head, targets, 0.1, grad_head)
        without, none = operations.cross_entropy(hidden, head, targets)
        assert none is None
        assert grad_hidden is not None
        assert loss == pytest.approx(without, rel=1e-7)
        losses.append(loss)
        results.append([grad_hidden, grad_head])
    check_equal(results[1:], results[0], rtol=3e-6)
    assert losses[1:] == [losses[1]] * 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("ignored", [[0], [1, 2, 3], list(range(9)), [0, 255, 256, 300]])
def test_cross_entropy_of_rows_that_are_ignored(
    compiled: list[CompiledOperations], ignored: list[int]
) -> None:
    """They are as if they were not there, and their hidden states have no gradient."""
    rows = 9 if max(ignored) < 9 else 301
    hidden, head = random(rows, 20), random(33, 20, seed=1)
    targets = np.random.default_rng(2).integers(0, 33, rows)
    targets[ignored] = IGNORED
    kept = targets != IGNORED
    grads = [np.zeros_like(head) for _ in range(4)]
    expected, grad_kept = 0.0, np.zeros((0, 20), np.float32)
    if kept.any():
        expected, some = NUMPY.cross_entropy(hidden[kept], head, targets[kept], 0.1, grads[0])
        assert some is not None
        grad_kept = some
    for operations, grad_head in zip((NUMPY, *compiled[:2]), grads[1:], strict=True):
        loss, grad_hidden = operations.cross_entropy(hidden, head, targets, 0.1, grad_head)
        assert grad_hidden is not None
        assert loss == pytest.approx(expected, rel=1e-6)
        assert operations.cross_entropy(hidden, head, targets)[0] == pytest.approx(loss, rel=1e-6)
        assert not grad_hidden[~kept].any()
        np.testing.assert_allclose(grad_hidden[kept], grad_kept, atol=1e-6)
        np.testing.assert_allclose(grad_head, grads[0], atol=1e-5)


def test_cross_entropy_of_nonfinite_logits(compiled: list[CompiledOperations]) -> None:
    """A row that is not finite has no finite loss, and leaves the gradients of others finite."""
    head, targets = random(40, 8, seed=1), np.array([1, 2, 39])
    for value in (np.nan, np.inf):
        hidden = random(3, 8)
        hidden[1, 3] = value
        loss, grad_hidden = compiled[1].cross_entropy(
            hidden, head, targets, 1.0, np.zeros_like(head)
        )
        assert grad_hidden is not None
        assert np.isnan(loss)
        assert np.isfinite(grad_hidden).all(axis=1).tolist() == [True, False, True]


def test_target_outside_the_vocabulary_is_refused(compiled: list[CompiledOperations]) -> None:
    with pytest.raises(IndexError, match="not in the vocabulary of 4 tokens"):
        compiled[0].cross_entropy(random(2, 3), random(4, 3), np.array([0, 4]))


@pytest.mark.parametrize("count", [1, 5, 16, 16384, 100_003])
def test_sum_of_squares(compiled: list[CompiledOperations], count: int) -> None:
    values = random(count)
    sums = {operations.sum_of_squares(values) for operations in compiled}
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(NUMPY.sum_of_squares(values), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sum_of_squares_of_nonfinite_values(
    compiled: list[CompiledOperations], value: float
) -> None:
    values = random(50_000)
    values[40_000] = value
    for operations in compiled:
        np.testing.assert_equal(operations.sum_of_squares(values), value)


@pytest.mark.parametrize("count", [1, 7, 100_003])
def test_adamw(compiled: list[CompiledOperations], count: int) -> None:
    settings = AdamWStep(3, 1e-2, 0.1, 0.9, 0.99, 1e-8, gradient_scale=0.5)
    results = []
    for operations in (NUMPY, *compiled):
        parameters, gradients, first, second = (random(count, seed=seed) for seed in range(4))
        second **= 2
        operations.adamw(parameters, gradients, first, second, settings)
        results.append([parameters, gradients, first, second])
    check_equal(results[1:], results[0], rtol=2e-6)


def test_arrays_of_another_type_or_order_are_refused(compiled: list[CompiledOperations]) -> None:
    with pytest.raises(TypeError, match="values is float64 in C order"):
        compiled[0].sum_of_squares(np.zeros(3))
    with pytest.raises(TypeError, match="values is float32 in another order"):
        compiled[0].sum_of_squares(random(4, 4).T)


def test_arrays_that_disagree_about_a_size_are_refused(compiled: list[CompiledOperations]) -> None:
    message = r"bias of layer_norm has the shape \(4,\), but d_model is 3"
    with pytest.raises(ValueError, match=message):
        compiled[0].layer_norm(random(2, 3), random(3), random(4), 1e-5)
