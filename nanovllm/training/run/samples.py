"""Text that a network generates during training, by the forward pass of the server's model."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float32, Float64

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_tree
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits
from nanovllm.model.numpy_sampler import apply_filters, draw_token
from nanovllm.model.philox import draw_keys, exponentials

Scorer: TypeAlias = Callable[[Sequence[int]], Float32[np.ndarray, " vocab"]]
"""Returns the scores of the token after a sequence."""
TEMPERATURE, TOP_P = 0.7, 0.9
"""Sampling of a run's samples, and the defaults in generation_config.json of its checkpoints.

Small models write words of their own at temperature 1 and repeat themselves below 0.6 (measurement
in the README of tiny-books)."""


def generate(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    tokens: int,
    *,
    seed: int,
    scores_after: Scorer | None = None,
) -> list[int]:
    """Return up to `tokens` token ids drawn after `prompt`; the context's end is the end.

    A token is drawn at TEMPERATURE from the smallest set of probability TOP_P.

    Args:
        config: sizes of the network.
        arrays: its parameters by Hugging Face name.
        prompt: token ids, at least one.
        tokens: number of tokens to draw.
        seed: of the draws.
        scores_after: the network, if it is not GPT-2.
    """
    scores_after = scores_after or _gpt2_scorer(config, arrays)
    ids = list(prompt)[-config.max_positions :]
    drawn: list[int] = []
    while len(drawn) < tokens and len(ids) <= config.max_positions:
        scores = scores_after(ids) / np.float32(TEMPERATURE)
        apply_filters(scores, top_k=0, top_p=TOP_P, min_p=0.0)
        token = draw_token(scores, _noise(seed, len(ids), scores.size))
        ids.append(token)
        drawn.append(token)
        if token in config.eos_token_ids:
            break
    return drawn


def _gpt2_scorer(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Scorer:
    """Return the scores of GPT-2, which computes only the tokens that were added."""
    weights = build_tree(arrays, config)
    cache = KVCache.allocate(config, blocks=1, block_size=config.max_positions)
    computed = 0

    def scores_after(ids: Sequence[int]) -> Float32[np.ndarray, " vocab"]:
        nonlocal computed
        batch = ForwardBatch.single(list(ids[computed:]), start=computed)
        computed = len(ids)
        return logits(weights, forward(config, weights, batch, cache))[0]

    return scores_after


def _noise(seed: int, position: int, vocab: int) -> Float64[np.ndarray, " vocab"]:
    """Return the numbers that draw the token at a position, as for a request."""
    seeds, choices, positions = (np.array([one]) for one in (seed, 0, position))
    return exponentials(draw_keys(seeds.astype(np.uint64), choices, positions)[0], vocab)
