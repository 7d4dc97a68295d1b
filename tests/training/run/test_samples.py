"""Samples of a training run: drawn from the most probable tokens."""

from pathlib import Path

import numpy as np

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_tree, load_arrays
from nanovllm.model.families.forward import forward
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits
from nanovllm.training.run.samples import TEMPERATURE, TOP_P, generate
from tests.support.checkpoints import write_tiny_model


def test_tokens_are_drawn_from_the_smallest_set_of_probability_top_p(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config, prompt = load_config(folder), [1, 2, 3]
    arrays = load_arrays(folder, config)
    weights = build_tree(arrays, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    hidden = forward(config, weights, ForwardBatch.single(prompt, start=0), cache)
    scores = logits(weights, hidden)[0].astype(np.float64) / TEMPERATURE
    probabilities = np.exp(scores) / np.exp(scores).sum()
    drawn = [generate(config, arrays, prompt, 1, seed=seed)[0] for seed in range(200)]
    cumulative = np.cumsum(-np.sort(-probabilities))
    size = int(np.count_nonzero(cumulative < TOP_P)) + 1
    assert 5 < len(set(drawn)) <= size < config.vocab
    assert set(drawn) <= set(np.argsort(-probabilities)[:size].tolist())
    likely = int(probabilities.argmax())
    share = probabilities[likely] / cumulative[size - 1]
    assert abs(drawn.count(likely) / len(drawn) - share) < 0.12
