"""No float64 anywhere in the forward pass, nor in what it stores."""

from pathlib import Path

import numpy as np
import pytest

from nanovllm.model import gpt2
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.embedding import embed
from nanovllm.model.ffn import feed_forward
from nanovllm.model.gpt2 import Arithmetic
from nanovllm.model.kv_cache import KVCache
from tests.support.batches import make_batch
from tests.support.checkpoints import write_checkpoint
from tests.support.float32_only import Float32Only, float32_only

ARITHMETIC = pytest.mark.parametrize(
    "arithmetic", [gpt2.FAST, gpt2.BATCH_INVARIANT], ids=["fast", "batch-invariant"]
)


@ARITHMETIC
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu", "mish"])
def test_the_whole_forward_pass_is_float32(
    tmp_path: Path, arithmetic: Arithmetic, activation: str
) -> None:
    folder = write_checkpoint(
        tmp_path,
        config={"activation_function": activation, "scale_attn_by_inverse_layer_idx": True},
    )
    config = GPT2Config.load(folder)
    weights = float32_only(load_weights(folder, config))
    cache = float32_only(
        KVCache.allocate(
            layers=config.layers,
            blocks=8,
            block_size=8,
            heads=config.heads,
            head_dim=config.head_dim,
        )
    )
    batch = make_batch([range(20), range(5, 10), [3]], block_size=8, all_rows=True)
    hidden = gpt2.forward(config, weights, batch, cache, arithmetic)
    assert type(hidden) is Float32Only, "the guard was lost on the way"
    assert hidden.dtype == gpt2.logits(weights, hidden, arithmetic).dtype == np.float32
    assert np.isfinite(np.asarray(hidden)).all()


@ARITHMETIC
def test_embedding_and_feed_forward_are_float32_and_leave_the_weights_alone(
    tmp_path: Path, arithmetic: Arithmetic
) -> None:
    folder = write_checkpoint(tmp_path)
    config = GPT2Config.load(folder)
    weights = float32_only(load_weights(folder, config))
    before = np.array(weights.token_embedding)
    hidden = embed(weights, np.arange(70, dtype=np.int64), np.arange(70, dtype=np.int64))
    np.testing.assert_array_equal(
        np.asarray(hidden), before[:70] + np.asarray(weights.position_embedding)[:70]
    )
    found = feed_forward(hidden, weights.layers[0].ffn, ACTIVATIONS["gelu_new"], arithmetic.product)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(weights.token_embedding), before)


def test_the_guard_finds_float64() -> None:
    guarded = float32_only(np.ones(3, dtype=np.float32))
    assert (guarded * 2.0).dtype == np.float32
    with pytest.raises(AssertionError, match="float64"):
        guarded * np.float64(2)
    with pytest.raises(AssertionError, match="float64"):
        guarded + np.zeros(3)  # a dtype left out is what it is there for
