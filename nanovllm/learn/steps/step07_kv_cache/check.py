"""What step 7 must do, and what goes wrong."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.learn.checking import Calls, Case, require
from nanovllm.learn.steps.step07_kv_cache.mistakes import MISTAKES
from nanovllm.learn.tiny_model import GREEDY, PROMPT, TINY_CONFIG, tiny_weights
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.families.forward import forward
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits

__all__ = ("CASES", "MISTAKES")

_HEADS, _HEAD_DIM, _EPSILON = TINY_CONFIG.heads, TINY_CONFIG.head_dim, TINY_CONFIG.epsilon
_TOKENS = np.array(PROMPT[:12])


@cache
def _engine() -> tuple[np.ndarray, KVCache]:
    """Return the engine's logits of the tokens, computed at once, and its cache."""
    kept = KVCache.allocate(TINY_CONFIG, blocks=1, block_size=len(_TOKENS))
    batch = ForwardBatch.single(_TOKENS, all_rows=True)
    return logits(tiny_weights(), forward(TINY_CONFIG, tiny_weights(), batch, kept)), kept


def _keys_and_values(layer: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values [2 heads, count, 3] whose numbers tell layer, token and head."""
    tokens = np.arange(start, start + count, dtype=np.float32)
    heads = np.arange(2, dtype=np.float32).reshape(2, 1, 1) * 10
    keys = 100 * (layer + 1) + heads + tokens.reshape(1, count, 1) + np.zeros(3, dtype=np.float32)
    return keys, -keys


def _kept(module: ModuleType) -> object:
    """Append to two layers as `forward` does, and return what the cache tells after each call."""
    kept, calls = module.KVCache(2, 2, 3, 16), Calls()
    calls.add("num_tokens of a new cache", kept.num_tokens)
    for start, count in ((0, 3), (3, 1), (4, 2)):
        for layer in range(2):
            kept.append(layer, *_keys_and_values(layer, start, count))
            calls.add(f"read({layer}) after append of {count} tokens", kept.read(layer))
            calls.add(f"num_tokens after append of {count} to layer {layer}", kept.num_tokens)
        calls.add("read(0) after layer 1 was appended to", kept.read(0))
    return calls


def _full(module: ModuleType) -> object:
    kept = module.KVCache(1, 2, 3, 4)
    kept.append(0, *_keys_and_values(0, 0, 4))
    try:
        kept.append(0, *_keys_and_values(0, 4, 1))
        is_refused = False
    except ValueError:
        is_refused = True
    require(is_refused, "a token was appended to a full cache; append must raise ValueError")
    return {"num_tokens after the refusal": kept.num_tokens, "the keys": kept.read(0)[0]}


def _new_cache(module: ModuleType) -> Any:
    return module.KVCache(TINY_CONFIG.layers, _HEADS, _HEAD_DIM, 4 * len(_TOKENS))


def _in_chunks(module: ModuleType, *ends: int) -> object:
    """Return the logits of the tokens, computed in chunks that end there, and the lengths."""
    kept, calls, start = _new_cache(module), Calls(), 0
    for end in ends:
        rows = module.forward(_TOKENS[start:end], tiny_weights(), _HEADS, _EPSILON, kept)
        calls.add(f"the logits of tokens {start} to {end - 1}", rows)
        calls.add(f"num_tokens after {end} tokens", kept.num_tokens)
        start = end
    return calls


def _whole_in_chunks(*ends: int) -> Calls:
    """Return what `_in_chunks` must give: the rows of the engine's whole."""
    calls, start = Calls(), 0
    for end in ends:
        calls.add(f"the logits of tokens {start} to {end - 1}", _engine()[0][start:end])
        calls.add(f"num_tokens after {end} tokens", end)
        start = end
    return calls


def _chunks(name: str, *ends: int) -> Case:
    return Case(name, lambda module: _in_chunks(module, *ends), lambda: _whole_in_chunks(*ends))


def _cache_of(module: ModuleType) -> object:
    kept = _new_cache(module)
    module.forward(_TOKENS, tiny_weights(), _HEADS, _EPSILON, kept)
    return [kept.read(layer) for layer in range(TINY_CONFIG.layers)]


def _engine_cache() -> object:
    kept = _engine()[1]
    return [
        tuple(array[layer, 0].transpose(1, 0, 2) for array in (kept.keys, kept.values))
        for layer in range(TINY_CONFIG.layers)
    ]


def _generate(module: ModuleType) -> object:
    return module.generate(list(PROMPT), tiny_weights(), _HEADS, _EPSILON, len(GREEDY))


def _computed(module: ModuleType) -> object:
    """Return how many tokens each call of `forward` by `generate` computes."""
    lengths: list[int] = []
    forward = module.forward

    def counting(token_ids: Any, *rest: Any, **named: Any) -> Any:
        lengths.append(len(token_ids))
        require(len(lengths) <= 20, "`generate` calls `forward` more than 20 times for 6 tokens")
        return forward(token_ids, *rest, **named)

    module.__dict__["forward"] = counting
    try:
        module.generate(list(PROMPT), tiny_weights(), _HEADS, _EPSILON, 6)
    finally:
        module.__dict__["forward"] = forward
    return {"tokens that each call of `forward` computes": lengths}


CASES = (
    Case("two layers keep what is appended", _kept),
    Case("a full cache refuses a token", _full),
    _chunks("the whole text at once", len(_TOKENS)),
    Case("keys and values equal the engine's", _cache_of, _engine_cache),
    _chunks("two chunks equal the whole", 7, len(_TOKENS)),
    _chunks("one token at a time equals the whole", *range(1, len(_TOKENS) + 1)),
    Case("24 tokens equal those of transformers", _generate, lambda: list(GREEDY)),
    Case(
        "each token is computed once",
        _computed,
        lambda: {"tokens that each call of `forward` computes": [len(PROMPT), 1, 1, 1, 1, 1]},
        "`forward` gets the prompt first, then only the token that was drawn last.",
    ),
)
