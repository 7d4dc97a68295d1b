"""Text that a network generates during training, by the forward pass of the server's model."""

from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.model import gpt2
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_tree
from nanovllm.model.config import GPT2Config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.numpy_sampler import apply_filters, draw_token
from nanovllm.model.philox import uniform

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
    weights = build_tree(arrays, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    ids = list(prompt)[-config.max_positions :]
    new, start = ids, 0
    drawn: list[int] = []
    while len(drawn) < tokens and start + len(new) <= config.max_positions:
        hidden = gpt2.forward(config, weights, ForwardBatch.single(new, start=start), cache)
        start += len(new)
        scores = gpt2.logits(weights, hidden)[0] / np.float32(TEMPERATURE)
        apply_filters(scores, top_k=0, top_p=TOP_P, min_p=0.0)
        token = draw_token(scores, _draw(seed, start))
        new = [token]
        drawn += new
        if token in config.eos_token_ids:
            break
    return drawn


def _draw(seed: int, position: int) -> float:
    """Return the number in [0, 1) that draws the token at a position, as for a request."""
    seeds, choices, positions = (np.array([one]) for one in (seed, 0, position))
    return float(uniform(seeds.astype(np.uint64), choices, positions)[0])
