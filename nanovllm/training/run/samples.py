"""Text that a network generates during training, by the forward pass of the server's model."""

from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.model import gpt2
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_layer, build_tree
from nanovllm.model.config import GPT2Config
from nanovllm.model.kv_cache import KVCache


def generate(
    config: GPT2Config,
    arrays: Mapping[str, np.ndarray],
    prompt: Sequence[int],
    tokens: int,
    *,
    seed: int,
    temperature: float = 0.8,
) -> list[int]:
    """Return up to `tokens` token ids drawn after `prompt`; the context's end is the end.

    Args:
        config: sizes of the network.
        arrays: its parameters by Hugging Face name.
        prompt: token ids, at least one.
        tokens: number of tokens to draw.
        seed: of the draws.
        temperature: the logits are divided by it.
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
        scores = gpt2.logits(weights, hidden)[0].astype(np.float64) / temperature
        probabilities = np.exp(scores - scores.max())
        cumulative = np.cumsum(probabilities)
        token = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        start += len(new)
        new = [min(token, config.vocab - 1)]
        drawn += new
        if token in config.eos_token_ids:
            break
    return drawn
