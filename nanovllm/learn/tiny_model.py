"""A tiny GPT-2 whose weights are drawn from a seed, and what transformers computes with it.

The numbers come from raw bits of PCG64, whose stream NumPy promises not to change, by arithmetic
that rounds the same everywhere. The recorded values are those of the case "untied" of
tests/reference, which tells how they are made.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from nanovllm.model.checkpoint import build_tree
from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import ModelWeights

TINY_CONFIG = ModelConfig(
    vocab=97,
    max_positions=128,
    d_model=32,
    layers=2,
    heads=4,
    d_ff=128,
    tied_head=False,
    eos_token_ids=(0,),
)
_SEED = 1025575226

PROMPT = (
    48, 73, 3, 58, 61, 20, 0, 85, 48, 47, 89, 65, 4, 65, 55, 23, 4, 86, 6, 71, 53, 67, 38, 9, 9, 49,
    43, 86, 67, 92, 22,
)  # fmt: skip
"""Tokens of a text."""
LOGPROBS = (
    -5.117, -7.2983, -10.6542, -5.7203, -9.9844, -12.168, -5.2895, -9.7046, -9.2443, -11.8015,
    -7.5459, -7.1412, -8.4521, -7.6404, -4.5881, -9.8796, -3.1281, -7.5409, -7.4545, -8.395,
    -8.4162, -8.2055, -12.2835, -10.0804, -8.0402, -5.3923, -4.7954, -7.9846, -4.595, -9.4204,
)  # fmt: skip
"""Log-probability of each token of the prompt but the first, by transformers; 4 digits."""
GREEDY = (
    62, 41, 30, 2, 30, 17, 17, 19, 30, 17, 19, 4, 30, 30, 17, 62, 41, 30, 41, 30, 17, 19, 19, 30,
)  # fmt: skip
"""Tokens that follow the prompt, each the most probable one, by transformers."""


@cache
def tiny_weights() -> ModelWeights:
    """Return the weights of the network of TINY_CONFIG; they must not be changed."""
    config = {"vocab_size": 97, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_inner": None}
    return build_tree(draw_tensors(config, _SEED), TINY_CONFIG)


def draw_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return every float32 tensor of a model by its name without prefix, also `lm_head.weight`.

    Weights are so large that the predictions are far from uniform. The config has the names of
    config.json.
    """
    bits = np.random.PCG64(seed)
    return {
        name: mean + np.float32(spread) * bell(bits, shape)
        for name, shape, mean, spread in _shapes(config)
    }


def _shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Name, shape, mean and spread of every tensor in a fixed order; matrices are [in, out]."""
    d_model = config["n_embd"]
    d_ff = config["n_inner"] or 4 * d_model
    word_spread = 2.4 / d_model**0.5
    yield "wte.weight", (config["vocab_size"], d_model), 0.0, word_spread
    yield "wpe.weight", (config["n_positions"], d_model), 0.0, 0.2
    for layer in range(config["n_layer"]):
        block = f"h.{layer}."
        for norm in ("ln_1", "ln_2"):
            yield f"{block}{norm}.weight", (d_model,), 1.0, 0.3
            yield f"{block}{norm}.bias", (d_model,), 0.0, 0.2
        for matrix, rows, columns, spread in (
            ("attn.c_attn", d_model, 3 * d_model, 1.0), ("attn.c_proj", d_model, d_model, 1.0),
            ("mlp.c_fc", d_model, d_ff, 1.5), ("mlp.c_proj", d_ff, d_model, 1.0),
        ):  # fmt: skip
            yield f"{block}{matrix}.weight", (rows, columns), 0.0, spread / rows**0.5
            yield f"{block}{matrix}.bias", (columns,), 0.0, 0.2
    yield "ln_f.weight", (d_model,), 1.0, 0.3
    yield "ln_f.bias", (d_model,), 0.0, 0.2
    yield "lm_head.weight", (config["vocab_size"], d_model), 0.0, word_spread


def bell(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Return bell-shaped numbers, mean 0, variance 1: sums of four 16-bit parts of a draw."""
    raw = np.asarray(bits.random_raw(int(np.prod(shape))), dtype=np.uint64)
    total = sum((raw >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    centred = np.asarray(total, dtype=np.float32) - np.float32(2 * 0xFFFF)
    return (centred * np.float32(3**0.5 / 0x10000)).reshape(shape)
