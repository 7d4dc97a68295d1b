"""What step 7 must do, and what goes wrong."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.learn.checking import Calls, Case, Mistake, require
from nanovllm.learn.tiny_model import GREEDY, PROMPT, TINY_CONFIG, tiny_weights
from nanovllm.model import gpt2
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kv_cache import KVCache

_HEADS, _HEAD_DIM, _EPSILON = TINY_CONFIG.heads, TINY_CONFIG.head_dim, TINY_CONFIG.epsilon
_TOKENS = np.array(PROMPT[:12])


@cache
def _engine() -> tuple[np.ndarray, KVCache]:
    """Return the engine's logits of the tokens, computed at once, and its cache."""
    kept = KVCache.allocate(TINY_CONFIG, blocks=1, block_size=len(_TOKENS))
    batch = ForwardBatch.single(_TOKENS, all_rows=True)
    return gpt2.logits(tiny_weights(), gpt2.forward(TINY_CONFIG, tiny_weights(), batch, kept)), kept


def _keys_and_values(layer: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values [2 heads, count, 3] whose numbers tell layer, token and head."""
    tokens = np.arange(start, start + count, dtype=np.float32)
    heads = np.arange(2, dtype=np.float32).reshape(2, 1, 1) * 10
    keys = 100 * (layer + 1) + heads + tokens.reshape(1, count, 1) + np.zeros(3, dtype=np.float32)
    return keys, -keys


def _kept(module: ModuleType) -> object:
    """Append to two layers as `forward` does, and return what the cache tells after each call."""
    kept, calls = module.KVCache(2, 2, 3, 8), Calls()
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

_START = "start = self._lengths[layer]"
_LENGTH = "self._lengths[layer] = end"
_RAISE = (
    "        if end > self._keys.shape[2]:\n            "
    'raise ValueError(f"{end} tokens do not fit; the cache has {self._keys.shape[2]}")\n'
)
_APPEND = "    cache.append(index, split_heads(keys, heads), split_heads(values, heads))\n"
_READ = "    all_keys, all_values = cache.read(index)\n"
_POSITIONS = "cache.num_tokens + np.arange(len(token_ids))"
_ATTEND = "heads_out = attention(split_heads(queries, heads), all_keys, all_values)"

MISTAKES = (
    Mistake(
        "writes at the beginning",
        "New tokens are written at the beginning of the memory and overwrite the first ones. They "
        "go behind the tokens that the layer has.",
        _START,
        "start = 0",
    ),
    Mistake(
        "one length for all layers",
        "All layers share one count of tokens, so the second layer writes behind the new tokens "
        "of the first. Count for each layer, or count the tokens when the last layer has them.",
        _START,
        "start = max(self._lengths)",
    ),
    Mistake(
        "one memory for all layers",
        "All layers write to the same memory. Every layer has keys and values of its own.",
        "        self._keys[layer, :, start:end] = keys\n"
        "        self._values[layer, :, start:end] = values",
        "        self._keys[:, :, start:end] = keys\n"
        "        self._values[:, :, start:end] = values",
    ),
    Mistake(
        "reads the whole memory",
        "`read` returns the memory behind the last token too. Its zeros would be keys like any "
        "others; return as many as were appended.",
        "return self._keys[layer, :, :end], self._values[layer, :, :end]",
        "return self._keys[layer], self._values[layer]",
    ),
    Mistake(
        "keys as values",
        "The keys are stored as the values too.",
        "self._values[layer, :, start:end] = values",
        "self._values[layer, :, start:end] = keys",
    ),
    Mistake(
        "tokens counted in each layer",
        "num_tokens counts a token once for each layer.",
        "return min(self._lengths)",
        "return sum(self._lengths)",
    ),
    Mistake(
        "counted at the first layer",
        "num_tokens counts a token as soon as the first layer has it. It counts once every layer "
        "has it; `forward` takes its positions from this number.",
        "return min(self._lengths)",
        "return self._lengths[0]",
    ),
    Mistake(
        "length not kept",
        "The number of tokens does not grow with `append`.",
        _LENGTH,
        "pass",
    ),
    Mistake(
        "length replaced",
        "The number of tokens becomes that of the last chunk; the chunk's is to be added.",
        _LENGTH,
        "self._lengths[layer] = keys.shape[1]",
    ),
    Mistake(
        "full cache drops tokens",
        "A full cache takes another token without an error, and loses it: NumPy copies [heads, 1, "
        "head_dim] to an empty slice silently. Compare with max_tokens first.",
        _RAISE,
        "",
    ),
    Mistake(
        "counted before the refusal",
        "A refused token is counted although it is not stored. Compare before anything changes.",
        _RAISE,
        f"        {_LENGTH}\n{_RAISE}",
    ),
    Mistake(
        "positions restart",
        "Positions start at 0 in every chunk. The first new token has the position "
        "cache.num_tokens.",
        _POSITIONS,
        "np.arange(len(token_ids))",
    ),
    Mistake(
        "positions one ahead",
        "The first new token has the position cache.num_tokens, not one more.",
        _POSITIONS,
        f"1 + {_POSITIONS}",
    ),
    Mistake(
        "all new tokens at one position",
        "All tokens of a chunk have the position of the first. Add np.arange(len(token_ids)).",
        _POSITIONS,
        "np.full(len(token_ids), cache.num_tokens)",
    ),
    Mistake(
        "appended twice",
        "Keys and values are appended twice in a layer, so every token is seen twice.",
        _APPEND,
        _APPEND * 2,
    ),
    Mistake(
        "layer not passed on",
        "Every layer uses the cache of layer 0.",
        "cached_attention(normed, layer, index, heads, cache)",
        "cached_attention(normed, layer, 0, heads, cache)",
    ),
    Mistake(
        "context without new tokens",
        "The cache is read before the new tokens are stored, so a token does not see itself. "
        "Append first, then read.",
        _APPEND + _READ,
        _READ + _APPEND,
    ),
    Mistake(
        "cache not read",
        "The new tokens see only themselves: attention gets the new keys and values instead of "
        "those of the cache.",
        _ATTEND,
        _ATTEND.replace("all_keys", "split_heads(keys, heads)").replace(
            "all_values", "split_heads(values, heads)"
        ),
    ),
    Mistake(
        "mask of a square",
        "A new token sees as many keys as it has new tokens before it: the mask is made for a "
        "square. The queries are the last of the tokens; the first sees all earlier keys.",
        _ATTEND,
        "weights = split_heads(queries, heads) @ all_keys.transpose(0, 2, 1)\n"
        "    weights *= np.float32(queries.shape[1] // heads) ** -0.5\n"
        "    weights[:, np.triu(np.ones(weights.shape[1:], dtype=bool), 1)] = -np.inf\n"
        "    weights = np.exp(weights - weights.max(axis=2, keepdims=True))\n"
        "    heads_out = weights / weights.sum(axis=2, keepdims=True) @ all_values",
    ),
    Mistake(
        "no mask in a chunk",
        "The new tokens see each other's future. Several new tokens need the mask among each "
        "other, whatever is in the cache.",
        _ATTEND,
        "weights = split_heads(queries, heads) @ all_keys.transpose(0, 2, 1)\n"
        "    weights *= np.float32(queries.shape[1] // heads) ** -0.5\n"
        "    weights = np.exp(weights - weights.max(axis=2, keepdims=True))\n"
        "    heads_out = weights / weights.sum(axis=2, keepdims=True) @ all_values",
    ),
    Mistake(
        "keys before the normalization",
        "Attention reads the hidden states without their normalization.",
        "cached_attention(normed,",
        "cached_attention(hidden,",
    ),
    Mistake(
        "first row",
        "The next token is taken from the first row of logits. The last row belongs to the last "
        "token, behind which the next one stands.",
        "greedy(rows[-1])",
        "greedy(rows[0])",
    ),
    Mistake(
        "prompt returned",
        "The prompt is returned too. Return the new tokens.",
        "    return tokens\n",
        "    return prompt_ids + tokens\n",
    ),
    Mistake(
        "one token too many",
        "One token more than max_new_tokens is returned.",
        "while len(tokens) < max_new_tokens:",
        "while len(tokens) <= max_new_tokens:",
    ),
    Mistake(
        "everything computed again",
        "Each step computes the whole text again with a new cache. The result is right and the "
        "cache saves nothing: give `forward` the last token only.",
        "        rows = forward(np.array(new), weights, heads, epsilon, cache)",
        "        new = prompt_ids + tokens\n"
        "        cache = KVCache(len(weights.layers), heads, head_dim, len(new))\n"
        "        rows = forward(np.array(new), weights, heads, epsilon, cache)",
    ),
    Mistake(
        "whole text into the cache",
        "Each step gives `forward` the whole text again, which the cache then has twice. Give it "
        "the last token only.",
        "new = tokens[-1:]",
        "new = prompt_ids + tokens",
    ),
    Mistake(
        "last prompt token twice",
        "The prompt is computed without its logits, then its last token again: the cache has that "
        "token twice. The logits of the prompt's last token are those of the first new one.",
        "    new = prompt_ids\n",
        "    forward(np.array(prompt_ids), weights, heads, epsilon, cache)\n"
        "    new = prompt_ids[-1:]\n",
    ),
    Mistake(
        "last token computed",
        "The last token is computed although nothing follows it.",
        "    return tokens\n",
        "    forward(np.array(new), weights, heads, epsilon, cache)\n    return tokens\n",
    ),
)
