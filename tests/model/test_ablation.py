"""Parts switched off in the weights, against a forward pass that drops their outputs by hand."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.model import ablation
from nanovllm.model.ablation import Part, parts_of, without
from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights, open_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward as serve
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import layer_norm
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.model.weights import ModelWeights
from tests.support.ablation import forward_without

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=np.int64)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> ModelConfig:
    return load_config(tiny_model)


@pytest.fixture(scope="module")
def weights(tiny_model: Path, config: ModelConfig) -> ModelWeights:
    return load_weights(tiny_model, config)


def forward(config: ModelConfig, weights: ModelWeights) -> np.ndarray:
    cache = KVCache.allocate(config, blocks=1, block_size=len(TOKENS))
    return serve(config, weights, ForwardBatch.single(TOKENS, all_rows=True), cache)


def test_the_parts_are_those_of_the_config(config: ModelConfig) -> None:
    assert parts_of(config)[:7] == [
        *(Part(0, "head", head) for head in range(4)),
        Part(0, "attention"),
        Part(0, "ffn"),
        Part(0, "block"),
    ]
    assert len(parts_of(config)) == config.layers * 7
    assert parts_of(config, ["block"]) == [Part(0, "block"), Part(1, "block")]


def test_a_part_that_is_switched_off_adds_nothing(
    config: ModelConfig, weights: ModelWeights
) -> None:
    whole = forward(config, weights)
    for part in parts_of(config):
        ablated = forward(config, without(weights, config, [part]))
        np.testing.assert_allclose(
            ablated, forward_without(config, weights, TOKENS.tolist(), [part]), atol=2e-5
        )
        assert np.abs(ablated - whole).max() > 1e-3, part


def test_parts_can_be_switched_off_together(config: ModelConfig, weights: ModelWeights) -> None:
    off = [Part(0, "head", 1), Part(0, "head", 3), Part(0, "ffn"), Part(1, "attention")]
    ablated = forward(config, without(weights, config, off))
    np.testing.assert_allclose(
        ablated, forward_without(config, weights, TOKENS.tolist(), off), atol=2e-5
    )


def test_a_network_without_all_blocks_is_its_embeddings(
    config: ModelConfig, weights: ModelWeights
) -> None:
    ablated = forward(config, without(weights, config, parts_of(config, ["block"])))
    embedded = weights.token_embedding[TOKENS] + weights.position_embedding[: len(TOKENS)]
    expected = layer_norm(embedded, weights.final_norm, config.epsilon)
    np.testing.assert_array_equal(ablated, expected)


def test_the_weights_themselves_stay_as_they_are(
    tiny_model: Path, config: ModelConfig, weights: ModelWeights
) -> None:
    before = forward(config, weights)
    for part in parts_of(config):
        forward(config, without(weights, config, [part]))
    np.testing.assert_array_equal(forward(config, weights), before)
    assert without(weights, config, []) is weights
    stored = without(open_weights(tiny_model, config), config, [])
    np.testing.assert_array_equal(forward(config, stored), before)


def test_the_numpy_backend_makes_no_block_in_a_forward_pass(
    tiny_model: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = (Part(1, "ffn"),)
    backend = NumpyBackend.load(tiny_model, LoadOptions(without=off))
    expected = forward(config, without(load_weights(tiny_model, config), config, off))
    monkeypatch.delattr(ablation, "block_without")
    backend.allocate_cache(1, len(TOKENS))
    hidden = backend.forward(ForwardBatch.single(TOKENS, all_rows=True))
    np.testing.assert_array_equal(hidden, expected)
