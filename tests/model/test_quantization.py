"""int8: matmuls err by no more than their codes allow, and the bundled model's predictions stay.

The int8 forward pass is the NumPy one of tests/support/quantized.py, the kernels' reference.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanovllm.errors import CheckpointError
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits
from nanovllm.model.quantization import (
    MAX_INPUTS,
    QuantizedLinear,
    calibrate,
    quantize_layer,
    quantize_linear,
    row_lengths,
    scale_columns,
)
from nanovllm.model.weights import Linear, ModelWeights
from tests.reference.cases import GPT2_CASES, options_of, prompts_of
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.planting import plant_channels, plant_residual
from tests.support.quantized import (
    QuantizedWeights,
    q8_0_logits,
    quantize,
    quantized_forward,
    quantized_linear,
)

BUNDLED = Path(__file__).parents[2] / "nanovllm" / "bundled" / "tiny-books"
TEXT = Path(__file__).parents[1] / "data" / "held_out" / "peter-rabbit.txt"
WINDOWS = 4
BLOCK_SIZE = 32
SIZES = st.integers(1, 60)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_config(BUNDLED)


@pytest.fixture(scope="module")
def weights(config: ModelConfig) -> ModelWeights:
    return load_weights(BUNDLED, config)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    """The held-out text as token ids [windows, tokens], after an end-of-text token."""
    ids = [
        0,
        *Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
        .encode(TEXT.read_text(encoding="utf-8"))
        .ids,
    ]
    length = len(ids) // WINDOWS
    return np.array(ids[: WINDOWS * length], dtype=np.int64).reshape(WINDOWS, length)


def logprobs_of(
    config: ModelConfig,
    weights: ModelWeights | QuantizedWeights,
    windows: np.ndarray,
    *,
    q8_0: bool = False,
) -> np.ndarray:
    """Log-probabilities [windows, tokens, vocab] in float64."""
    batch = make_batch(list(windows), block_size=BLOCK_SIZE, all_rows=True)
    blocks = int(batch.block_tables.max()) + 1
    cache = KVCache.allocate(config, blocks=blocks, block_size=BLOCK_SIZE)
    if isinstance(weights, QuantizedWeights):
        scores = quantized_linear(quantized_forward(config, weights, batch, cache), weights.head)
    elif q8_0:
        scores = q8_0_logits(config, weights, batch, cache)
    else:
        scores = logits(weights, forward(config, weights, batch, cache))
    assert scores.dtype == np.float32
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    logprobs: np.ndarray = (shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))).reshape(
        *windows.shape, -1
    )
    return logprobs


def divergence(exact: np.ndarray, rounded: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence in nats a token."""
    return float((np.exp(exact) * (exact - rounded)).sum(axis=2).mean())


def perplexity(logprobs: np.ndarray, windows: np.ndarray) -> float:
    return float(np.exp(-np.take_along_axis(logprobs[:, :-1], windows[:, 1:, None], axis=2).mean()))


def arrays_of(value: Any) -> list[np.ndarray]:
    """Every array in a tree of dataclasses, in order."""
    if is_dataclass(value):
        return [array for field in fields(value) for array in arrays_of(getattr(value, field.name))]
    return (
        [array for item in value for array in arrays_of(item)]
        if isinstance(value, tuple)
        else []
        if value is None
        else [value]
    )


def random_product(seed: int, rows: int, d_in: int, d_out: int) -> tuple[np.ndarray, Linear]:
    """Inputs and weights whose channels and columns have very different sizes."""
    random = np.random.default_rng(seed)
    inputs = random.normal(0, 1, (rows, d_in)) * np.exp(random.normal(0, 1, d_in))
    weight = (
        random.normal(0, 1, (d_in, d_out))
        * np.exp(random.normal(0, 1, (d_in, 1)))
        * np.exp(random.normal(0, 1, d_out))
    )
    return inputs.astype(np.float32), Linear(
        weight.astype(np.float32), random.normal(0, 1, d_out).astype(np.float32)
    )


def rounded_product(
    inputs: np.ndarray, linear: Linear, peaks: np.ndarray
) -> tuple[np.ndarray, QuantizedLinear, np.ndarray]:
    """The output of a product in int8, the product, and the inputs as it takes them."""
    multipliers = row_lengths(linear.weight)
    quantized = quantize_linear(linear.weight, linear.bias, multipliers, peaks)
    scaled = inputs * multipliers
    return quantized_linear(scaled, quantized), quantized, scaled


# ---- one product


@given(seed=st.integers(0, 1000), rows=st.integers(1, 20), d_in=SIZES, d_out=SIZES)
def test_a_product_errs_by_no_more_than_its_codes_allow(
    seed: int, rows: int, d_in: int, d_out: int
) -> None:
    inputs, linear = random_product(seed, rows, d_in, d_out)
    actual, quantized, scaled = rounded_product(inputs, linear, np.abs(inputs).max(axis=0))
    weight = np.abs(quantized.codes * quantized.column_scales)
    inliers = scaled.copy()
    inliers[:, quantized.outliers] = 0
    extent = np.maximum(inliers.max(axis=1), 0) - np.minimum(inliers.min(axis=1), 0)
    row_error = (
        extent[:, None] / 255 * weight.sum(axis=0)
    )  # half a code by rounding, half where the last code is full
    weight_error = np.abs(inliers).sum(axis=1)[:, None] * quantized.column_scales / 2
    exact = inputs.astype(np.float64) @ linear.weight + linear.bias
    rounding = 1e-5 * (np.abs(inputs) @ np.abs(linear.weight) + np.abs(linear.bias))
    assert (np.abs(actual - exact) <= row_error + weight_error + rounding).all()


@given(seed=st.integers(0, 1000), rows=st.integers(1, 20), d_in=SIZES, d_out=SIZES)
def test_every_scale_is_used_to_the_full(seed: int, rows: int, d_in: int, d_out: int) -> None:
    inputs, linear = random_product(seed, rows, d_in, d_out)
    _, quantized, _ = rounded_product(inputs, linear, np.ones(d_in, dtype=np.float32))
    assert quantized.codes.dtype == np.int8
    np.testing.assert_array_equal(np.abs(quantized.codes.astype(np.int64)).max(axis=0), 127)


@given(
    seed=st.integers(0, 1000),
    d_in=st.integers(4, 60),
    d_out=SIZES,
    exponents=st.lists(st.integers(-6, 6), min_size=1, max_size=60),
)
def test_scaled_outputs_have_the_same_codes(
    seed: int, d_in: int, d_out: int, exponents: list[int]
) -> None:
    """Powers of two, so that nothing is rounded differently."""
    inputs, linear = random_product(seed, 3, d_in, d_out)
    factors = np.exp2(np.resize(exponents, d_out)).astype(np.float32)
    peaks = np.abs(inputs).max(axis=0)
    actual, quantized, _ = rounded_product(inputs, linear, peaks)
    scaled, larger, _ = rounded_product(
        inputs, Linear(linear.weight * factors, linear.bias * factors), peaks
    )
    np.testing.assert_array_equal(larger.codes, quantized.codes)
    np.testing.assert_array_equal(scaled, actual * factors)
    for ours, theirs in zip(
        arrays_of(scale_columns(quantized, factors)), arrays_of(larger), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_scaled_channel_costs_nothing() -> None:
    inputs, linear = random_product(1, 50, 256, 300)
    exact = inputs @ linear.weight + linear.bias
    actual, _, _ = rounded_product(inputs, linear, np.abs(inputs).max(axis=0))
    factors = np.ones(256, dtype=np.float32)
    factors[[3, 70, 200]] = 1000
    larger = inputs * factors
    scaled, quantized, _ = rounded_product(
        larger, Linear(linear.weight / factors[:, None], linear.bias), np.abs(larger).max(axis=0)
    )
    assert not np.isin([3, 70, 200], quantized.outliers).any()
    assert np.square(scaled - exact).mean() < 1.1 * np.square(actual - exact).mean()


def test_outliers_are_exact_and_leave_the_others_their_codes() -> None:
    inputs, linear = random_product(2, 50, 256, 300)
    inputs[:, [5, 100]] *= 1000
    peaks = np.abs(inputs).max(axis=0)
    actual, quantized, _ = rounded_product(inputs, linear, peaks)
    assert set(quantized.outliers.tolist()) >= {5, 100}
    assert not quantized.codes[quantized.outliers].any()
    others = inputs.copy()
    others[:, quantized.outliers] = 0
    alone, _, _ = rounded_product(others, linear, peaks)
    of_outliers = (
        inputs[:, quantized.outliers].astype(np.float64) @ linear.weight[quantized.outliers]
    )
    np.testing.assert_allclose(
        actual, alone + of_outliers, rtol=1e-5, atol=1e-5 * np.abs(of_outliers).max()
    )


def test_zeros_stay_zeros() -> None:
    inputs, linear = random_product(3, 8, 40, 30)
    inputs[[0, 5]] = 0
    linear.weight[[0, 7, 39]] = 0
    linear.weight[:, [0, 29]] = 0
    actual, quantized, _ = rounded_product(inputs, linear, np.abs(inputs).max(axis=0))
    np.testing.assert_array_equal(actual[[0, 5]], np.broadcast_to(linear.bias, (2, 30)))
    np.testing.assert_array_equal(actual[:, [0, 29]], np.broadcast_to(linear.bias[[0, 29]], (8, 2)))
    assert all(np.isfinite(array).all() for array in arrays_of(quantized))
    nothing, _, _ = rounded_product(
        inputs, Linear(np.zeros_like(linear.weight), linear.bias), np.zeros(40, dtype=np.float32)
    )
    np.testing.assert_array_equal(nothing, np.broadcast_to(linear.bias, (8, 30)))


@pytest.mark.parametrize("tiny", [1e-44, 1e-38, 1e-30, 1e-20])
def test_tiny_numbers_stay_finite(tiny: float) -> None:
    inputs, linear = random_product(4, 8, 40, 30)
    linear.weight[3] *= np.float32(tiny)
    linear.weight[:, 4] *= np.float32(tiny)
    inputs[5] *= np.float32(tiny)
    actual, quantized, _ = rounded_product(inputs, linear, np.abs(inputs).max(axis=0))
    assert all(np.isfinite(array).all() for array in [actual, *arrays_of(quantized)])


def test_the_head_keeps_the_order_of_the_embedding() -> None:
    """So that packing reads its codes in the order in which they lie."""
    embedding = np.random.default_rng(5).normal(0, 1, (50, 16)).astype(np.float32)
    ones = np.ones(16, dtype=np.float32)
    quantized = quantize_linear(embedding.T, np.zeros(50, dtype=np.float32), ones, ones)
    assert quantized.codes.T.flags.c_contiguous
    same = quantize_linear(
        np.ascontiguousarray(embedding.T), np.zeros(50, dtype=np.float32), ones, ones
    )
    np.testing.assert_array_equal(quantized.codes, same.codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    _, linear = random_product(6, 1, 20, 20)
    linear.weight[3, 4] = bad
    ones = np.ones(20, dtype=np.float32)
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_linear(linear.weight, linear.bias, ones, ones)


def test_sums_that_an_int32_may_not_hold_are_refused() -> None:
    assert MAX_INPUTS * 127 * 255 < 2**31 <= (MAX_INPUTS + 1) * 127 * 255
    ones = np.ones(MAX_INPUTS + 1, dtype=np.float32)
    with pytest.raises(CheckpointError, match=f"at most {MAX_INPUTS}"):
        quantize_linear(ones[:, None], ones[:1], ones, ones)


# ---- the whole model


@pytest.fixture(scope="module")
def without(config: ModelConfig, weights: ModelWeights, windows: np.ndarray) -> float:
    """The divergence of the rounded model without planted channels: about 8e-4 nats."""
    exact = logprobs_of(config, weights, windows)
    return divergence(exact, logprobs_of(config, quantize(config, weights), windows))


def test_perplexity_stays(
    config: ModelConfig, weights: ModelWeights, windows: np.ndarray, without: float
) -> None:
    exact = logprobs_of(config, weights, windows)
    rounded = logprobs_of(config, quantize(config, weights), windows)
    assert perplexity(exact, windows) < 50, "the text is not what the model can read"
    assert abs(perplexity(rounded, windows) / perplexity(exact, windows) - 1) < 0.005
    # Without outliers Q8_0 is finer: it has a scale for 32 weights, not for a whole channel.
    assert without < 1.6 * divergence(exact, logprobs_of(config, weights, windows, q8_0=True))
    assert without < 1e-3


@pytest.mark.parametrize(
    ("factor", "count", "seed"), [(30, 1, 0), (30, 4, 1), (30, 8, 2), (100, 1, 3)]
)
def test_planted_channels_diverge_less_than_in_q8_0(
    config: ModelConfig,
    weights: ModelWeights,
    windows: np.ndarray,
    without: float,
    factor: float,
    count: int,
    seed: int,
) -> None:
    planted = plant_channels(config, weights, factor=factor, count=count, seed=seed)
    exact = logprobs_of(config, planted, windows)
    ours = divergence(exact, logprobs_of(config, quantize(config, planted), windows))
    assert ours < 0.5 * divergence(exact, logprobs_of(config, planted, windows, q8_0=True))
    assert ours < 1.2 * without


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "linear"])
def test_planted_channels_that_keep_the_function_cost_nothing(
    config: ModelConfig, weights: ModelWeights, windows: np.ndarray, activation: str
) -> None:
    other = replace(config, activation=activation)
    planted = plant_channels(other, weights, factor=30, count=4)
    exact = logprobs_of(other, weights, windows)
    np.testing.assert_allclose(logprobs_of(other, planted, windows), exact, rtol=0, atol=1e-2)
    without = divergence(exact, logprobs_of(other, quantize(other, weights), windows))
    assert divergence(exact, logprobs_of(other, quantize(other, planted), windows)) < 1.3 * without


@pytest.mark.parametrize(("size", "pairs"), [(100, 2), (30, 3), (10, 3)])
def test_a_few_huge_residual_channels_cost_little(
    config: ModelConfig, weights: ModelWeights, windows: np.ndarray, size: float, pairs: int
) -> None:
    planted = plant_residual(weights, size=size, pairs=pairs)
    exact = logprobs_of(config, planted, windows)
    ours = divergence(exact, logprobs_of(config, quantize(config, planted), windows))
    q8_0 = divergence(exact, logprobs_of(config, planted, windows, q8_0=True))
    assert ours < (0.8 if size >= 100 else 2) * q8_0


@pytest.mark.parametrize("name", GPT2_CASES)
def test_any_checkpoint_can_be_rounded(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, **options_of(name))
    config = load_config(folder)
    weights = load_weights(folder, config)
    prompt = prompts_of(config.vocab, config.max_positions)[-1][None]
    exact = logprobs_of(config, weights, prompt)
    ours = divergence(exact, logprobs_of(config, quantize(config, weights), prompt))
    theirs = divergence(exact, logprobs_of(config, weights, prompt, q8_0=True))
    assert 0 < ours < 3 * theirs


def test_rounding_repeats_and_leaves_the_weights_alone(
    config: ModelConfig, weights: ModelWeights
) -> None:
    before = [array.copy() for array in arrays_of(weights)]
    first, second = (arrays_of(quantize(config, weights)) for _ in range(2))
    for ours, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, again)
    for array, old in zip(arrays_of(weights), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_calibration_measures_every_product(config: ModelConfig, weights: ModelWeights) -> None:
    calibration = calibrate(config, weights)
    assert len(calibration.layers) == config.layers
    for layer, peaks in zip(weights.layers, calibration.layers, strict=True):
        sizes = [layer.qkv, layer.out, layer.up, layer.down]
        assert [len(values) for values in arrays_of(peaks)] == [
            len(linear.weight) for linear in sizes
        ]
        assert all((values > 0).all() for values in arrays_of(peaks))
    down = quantize_layer(weights.layers[0], calibration.layers[0], config.head_dim).down
    assert down.input_factors.shape == (config.d_ff,)
