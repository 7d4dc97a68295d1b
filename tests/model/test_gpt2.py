"""The blocks of the forward pass against float64; what an observer sees; float32 throughout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.attention import softmax
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.families.gpt2 import network as gpt2
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import layer_norm, linear, logits
from nanovllm.model.observer import ignore
from nanovllm.model.weights import LayerNorm, Linear, ModelWeights
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.float32_only import Float32Only, float32_only

EPSILON = 1e-5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def random_norm(seed: int, d_model: int) -> LayerNorm:
    gain, bias = np.float32(0.3) * normal(seed, 2, d_model)
    return LayerNorm(1 + gain, bias)


def exact_norm(hidden: np.ndarray, norm: LayerNorm, epsilon: float) -> np.ndarray:
    rows = hidden.astype(np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True)
    variance = (centred**2).mean(axis=1, keepdims=True)
    exact: np.ndarray = centred / np.sqrt(variance + epsilon) * norm.gain + norm.bias
    return exact


# Layer norm ---------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 9),
    d_model=st.integers(1, 70),
    epsilon=st.sampled_from([1e-5, 1e-6, 1e-3, 1.0]),
)
def test_a_norm_is_its_formula(seed: int, tokens: int, d_model: int, epsilon: float) -> None:
    hidden, norm = 2 * normal(seed, tokens, d_model), random_norm(seed, d_model)
    before = hidden.copy()
    actual = layer_norm(hidden, norm, epsilon)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, exact_norm(hidden, norm, epsilon), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(hidden, before)


def test_outliers_cost_no_more_than_the_last_digits() -> None:
    hidden, norm = 2 * normal(1, 50, 768), random_norm(6, 768)
    hidden[:, 138], hidden[:, 378], hidden[:, 447] = 1100.0, -700.0, -400.0
    exact = exact_norm(hidden, norm, EPSILON)
    np.testing.assert_allclose(layer_norm(hidden, norm, EPSILON), exact, rtol=1e-5, atol=2e-6)


def test_a_mean_far_from_zero_costs_only_what_float32_has_lost_before() -> None:
    hidden, norm = 2 * normal(2, 50, 768) + np.float32(1000.0), random_norm(7, 768)
    exact = exact_norm(hidden, norm, EPSILON)
    np.testing.assert_allclose(layer_norm(hidden, norm, EPSILON), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.5, -64.0])
def test_a_row_without_variance_is_the_bias(value: float) -> None:
    norm = random_norm(3, 64)
    rows = layer_norm(np.full((2, 64), value, dtype=np.float32), norm, EPSILON)
    np.testing.assert_array_equal(rows, np.stack([norm.bias, norm.bias]))


@pytest.mark.parametrize("d_model", [1, 7, 64, 129, 768])
def test_the_bits_of_a_norms_row_do_not_depend_on_the_rows_beside_it(d_model: int) -> None:
    hidden, norm = 2 * normal(4, 33, d_model), random_norm(4, d_model)
    together = layer_norm(hidden, norm, EPSILON)
    for row in range(33):
        alone = layer_norm(hidden[row : row + 1], norm, EPSILON)
        np.testing.assert_array_equal(alone[0], together[row])
    hidden[5] = np.nan
    actual = layer_norm(hidden, norm, EPSILON)
    np.testing.assert_array_equal(np.delete(actual, 5, axis=0), np.delete(together, 5, axis=0))


# Linear -------------------------------------------------------------------------------------------


def test_weights_are_stored_in_by_out() -> None:
    weight = np.array([[1, 2, 3], [10, 20, 30]], dtype=np.float32)
    layer = Linear(weight, np.array([100, 200, 300], dtype=np.float32))
    hidden = np.array([[1, 1], [2, 0], [0, 0]], dtype=np.float32)
    expected = [[111, 222, 333], [102, 204, 306], [100, 200, 300]]
    np.testing.assert_array_equal(linear(hidden, layer), expected)


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    hidden, layer = normal(8, 40, 33), Linear(normal(9, 33, 21), normal(10, 21))
    before = hidden.copy()
    expected = linear(hidden, layer)
    np.testing.assert_array_equal(hidden, before)
    hidden[[0, 17, 39]] = np.nan
    actual = linear(hidden, layer)
    assert np.isnan(actual[[0, 17, 39]]).all()
    others = np.delete(np.arange(40), [0, 17, 39])
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-5, atol=1e-5)


# The whole forward pass ---------------------------------------------------------------------------


@pytest.fixture
def config(tiny_model: Path) -> ModelConfig:
    return load_config(tiny_model)


@pytest.fixture
def weights(tiny_model: Path, config: ModelConfig) -> ModelWeights:
    return load_weights(tiny_model, config)


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None, np.ndarray]] = []

    def __call__(self, name: str, layer: int | None, array: np.ndarray, /) -> None:
        self.calls.append((name, layer, array))

    def find(self, name: str, layer: int | None = None) -> list[np.ndarray]:
        return [array for call, at, array in self.calls if (call, at) == (name, layer)]


def run(
    config: ModelConfig, weights: ModelWeights, batch: ForwardBatch
) -> tuple[np.ndarray, np.ndarray, Recorder]:
    """The final hidden states without and with an observer, and what it saw."""
    hidden, recorder = [], Recorder()
    for observe in (ignore, recorder):
        cache = KVCache.allocate(config, blocks=8, block_size=8)
        hidden.append(forward(config, weights, batch, cache, observe))
    return hidden[0], hidden[1], recorder


def test_an_observer_sees_every_intermediate(config: ModelConfig, weights: ModelWeights) -> None:
    batch = make_batch([range(20), [7, 8, 9]], block_size=8, all_rows=True)
    plain, observed, recorder = run(config, weights, batch)
    np.testing.assert_array_equal(plain, observed)
    (embeddings,) = recorder.find("embeddings")
    np.testing.assert_array_equal(embeddings, gpt2.embed(weights, batch.token_ids, batch.positions))
    hidden = embeddings
    for layer, layer_weights in enumerate(weights.layers):
        maps = recorder.find("attention_weights", layer)
        assert [array.shape for array in maps] == [(config.heads, 20, 20), (config.heads, 3, 3)]
        for array in maps:
            np.testing.assert_allclose(array.sum(axis=2), 1.0, rtol=1e-5)
            assert not np.triu(array, k=1).any(), "a token attends to a later one"
        (normed,) = recorder.find("attention_input", layer)
        np.testing.assert_array_equal(
            normed, layer_norm(hidden, layer_weights.attention_norm, config.epsilon)
        )
        parts = np.split(linear(normed, layer_weights.qkv), 3, axis=1)
        by_part = [part.reshape(23, config.heads, config.head_dim) for part in parts]
        for name, part in zip(("queries", "keys", "values"), by_part, strict=True):
            np.testing.assert_array_equal(recorder.find(name, layer), [part])
        queries, keys, by_head = (part.transpose(1, 0, 2) for part in by_part)
        for scores, weights_map, rows in zip(
            recorder.find("attention_scores", layer), maps, (slice(20), slice(20, 23)), strict=True
        ):
            products = queries[:, rows] @ keys[:, rows].transpose(0, 2, 1)
            seen = np.tril(np.ones(scores.shape, dtype=bool))
            expected = np.where(seen, config.attention_scale(layer) * products, -np.inf)
            np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(softmax(scores), weights_map)
        mixed = [maps[0] @ by_head[:, :20], maps[1] @ by_head[:, 20:]]
        (attn_out,) = recorder.find("attn_out", layer)
        expected = np.concatenate(mixed, axis=1).transpose(1, 0, 2).reshape(23, config.d_model)
        np.testing.assert_allclose(attn_out, expected, rtol=1e-5, atol=1e-6)
        (after_attention,) = recorder.find("hidden_after_attention", layer)
        np.testing.assert_array_equal(after_attention, hidden + linear(attn_out, layer_weights.out))
        (ffn_input,) = recorder.find("ffn_input", layer)
        (ffn_hidden,) = recorder.find("ffn_hidden", layer)
        activation = ACTIVATIONS[config.activation]
        np.testing.assert_array_equal(ffn_hidden, activation(linear(ffn_input, layer_weights.up)))
        (hidden,) = recorder.find("hidden_after_ffn", layer)
        np.testing.assert_array_equal(
            hidden, after_attention + linear(ffn_hidden, layer_weights.down)
        )
    (final_hidden,) = recorder.find("final_hidden")
    np.testing.assert_array_equal(final_hidden, observed)
    assert len(recorder.calls) == 2 + 13 * config.layers, "two sequences: two maps"


def test_the_logit_lens_ends_in_the_logits(config: ModelConfig, weights: ModelWeights) -> None:
    """The final norm and the head, applied to the residual stream after each layer."""
    final_hidden, _, recorder = run(config, weights, ForwardBatch.single(range(8), all_rows=True))
    lens = [
        logits(weights, layer_norm(hidden, weights.final_norm, config.epsilon))
        for layer in range(config.layers)
        for hidden in recorder.find("hidden_after_ffn", layer)
    ]
    assert len(lens) == config.layers
    np.testing.assert_array_equal(lens[-1], logits(weights, final_hidden))
    assert not np.allclose(lens[0], lens[-1], atol=0.1)


def test_a_single_sequence_continues_from_its_cache(
    config: ModelConfig, weights: ModelWeights
) -> None:
    tokens = [3, 14, 15, 9, 2, 6]
    whole_cache, cache = (KVCache.allocate(config, blocks=1, block_size=8) for _ in range(2))
    whole = forward(config, weights, ForwardBatch.single(tokens, all_rows=True), whole_cache)
    forward(config, weights, ForwardBatch.single(tokens[:4]), cache)
    last = forward(config, weights, ForwardBatch.single(tokens[4:], start=4), cache)
    np.testing.assert_allclose(last, whole[-1:], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.keys, whole_cache.keys, rtol=1e-5, atol=1e-5)


def test_a_token_that_is_not_a_number_reaches_no_earlier_one_nor_another_sequence(
    config: ModelConfig, weights: ModelWeights
) -> None:
    batch = make_batch([range(20), range(30, 40)], block_size=8, all_rows=True)
    expected, _, _ = run(config, weights, batch)
    embedding = weights.token_embedding.copy()
    embedding[12] = np.nan
    actual, _, _ = run(config, replace(weights, token_embedding=embedding), batch)
    assert np.isnan(actual[12:20]).all()
    others = np.r_[0:12, 20:30]
    np.testing.assert_allclose(actual[others], expected[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "mish"])
def test_the_whole_forward_pass_is_float32(tmp_path: Path, activation: str) -> None:
    changes = {"activation_function": activation, "scale_attn_by_inverse_layer_idx": True}
    folder = write_checkpoint(tmp_path, config=changes)
    config = load_config(folder)
    weights = float32_only(load_weights(folder, config))
    before = np.array(weights.token_embedding)
    cache = float32_only(KVCache.allocate(config, blocks=8, block_size=8))
    batch = make_batch([range(20), range(5, 10), [3]], block_size=8, all_rows=True)
    hidden = forward(config, weights, batch, cache)
    assert type(hidden) is Float32Only, "the guard was lost on the way"
    assert hidden.dtype == logits(weights, hidden).dtype == np.float32
    assert np.isfinite(np.asarray(hidden)).all()
    np.testing.assert_array_equal(np.asarray(weights.token_embedding), before)


def test_the_guard_finds_float64() -> None:
    guarded = float32_only(np.ones(3, dtype=np.float32))
    assert (guarded * 2.0).dtype == np.float32
    with pytest.raises(AssertionError, match="float64"):
        guarded * np.float64(2)
    with pytest.raises(AssertionError, match="float64"):
        guarded + np.zeros(3)  # a dtype left out is what it is there for
