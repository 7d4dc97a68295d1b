"""Text that a network generates during training, by the forward pass of the server's model."""

from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.model import gpt2
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_layer, build_tree
from nanovllm.model.config import GPT2Config
from nanovllm.model.kv_cache import KVCache

TEMPERATURE, TOP_P = 0.7, 0.9
"""Sampling of a run's samples, and the defaults in generation_config.json of its checkpoints.

Small models write words of their own at temperature 1 and repeat themselves below 0.6 (measurement
in the README of tiny-books)."""


def generate(
    config: GPT2Config,
    arrays: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    tokens: int,
    *,
    seed: int,
) -> list[int]:
    """Return up to `tokens` token ids drawn after `prompt`; the context's end is the end.

    A token is drawn at TEMPERATURE from the smallest set of probability TOP_P.

    Args:
        config: sizes of the network.
        arrays: its parameters by Hugging Face name.
        prompt: token ids, at least one.
        tokens: number of tokens to draw.
        seed: of the draws.
    """
    layers = tuple(build_layer(arrays, index) for index in range(config.layers))
    weights = build_tree(arrays, layers, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    generator = np.random.default_rng(seed)
    ids = list(prompt)[-config.max_positions :]
    new, start = ids, 0
    drawn: list[int] = []
    while len(drawn) < tokens and start + len(new) <= config.max_positions:
        hidden = gpt2.forward(config, weights, ForwardBatch.single(new, start=start), cache)
        scores = gpt2.logits(weights, hidden)[0].astype(np.float64) / TEMPERATURE
        order = np.argsort(-scores, kind="stable")
        cumulative = np.cumsum(np.exp(scores[order] - scores.max()))
        last = np.searchsorted(cumulative, TOP_P * cumulative[-1])
        rank = np.searchsorted(cumulative, generator.random() * cumulative[last], side="right")
        token = int(order[min(rank, last)])
        start += len(new)
        new = [token]
        drawn += new
        if token in config.eos_token_ids:
            break
    return drawn
