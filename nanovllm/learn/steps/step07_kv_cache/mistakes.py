"""What goes wrong in step 7."""

from nanovllm.learn.checking import Mistake

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

_STORED = (
    "        self._keys[layer, :, start:end] = keys\n"
    "        self._values[layer, :, start:end] = values\n"
)
_RETURNED = "return self._keys[layer, :, :end], self._values[layer, :, :end]"
_LOGITS = "return logits(layer_norm(hidden, norm.gain, norm.bias, epsilon), weights.head)"
_FORWARD = """        hidden = hidden + cached_attention(normed, layer, index, heads, cache)
        normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)
        hidden = hidden + feed_forward(normed, layer.up, layer.down)
"""

MISTAKES = (
    Mistake(
        "one count for all layers",
        "All layers share one count of tokens, so the second layer writes behind the new "
        "tokens of the first. Count for each layer.",
        _LENGTH,
        "self._lengths = [end] * len(self._lengths)",
    ),
    Mistake(
        "one list for all layers",
        "All layers have the same memory and the same count. Every layer has its own; [[]] * "
        "layers is one list, layers times.",
        f"{_STORED}        {_LENGTH}",
        f"{_STORED.replace('layer', ':')}        self._lengths = [end] * len(self._lengths)",
    ),
    Mistake(
        "tokens on another axis",
        "The shapes do not fit. The tokens are axis 1 of keys and values: keys.shape[1] are "
        "new, and np.concatenate joins them with axis=1.",
        _LENGTH,
        f"{_LENGTH}\n        np.concatenate([self._keys[layer, :, :start], keys])",
    ),
    Mistake(
        "full too early",
        "The last token that fits is refused: `>=` where `>` is meant.",
        "if end > self._keys.shape[2]:",
        "if end >= self._keys.shape[2]:",
    ),
    Mistake(
        "read leaves out the newest",
        "`read` leaves out what was just appended to this layer: num_tokens counts a token "
        "when every layer has it. Attention in this layer reads it before that; keep a count "
        "for each layer.",
        f"end = self._lengths[layer]\n        {_RETURNED}",
        f"end = self.num_tokens\n        {_RETURNED}",
    ),
    Mistake(
        "keys alone",
        "`read` returns the keys alone. It returns keys and values.",
        _RETURNED,
        "return self._keys[layer, :, :end]",
    ),
    Mistake(
        "values first",
        "`read` returns the values first. The keys come first.",
        _RETURNED,
        "return self._values[layer, :, :end], self._keys[layer, :, :end]",
    ),
    Mistake(
        "cache stays empty",
        "The cache stays empty. cached_attention appends the new keys and values to it; "
        "`self_attention` and `block` of the earlier steps do not.",
        _APPEND + _READ,
        "    all_keys, all_values = split_heads(keys, heads), split_heads(values, heads)\n",
    ),
    Mistake(
        "new keys joined again",
        "The new tokens are joined to what was read, which has them already: every new token "
        "is seen twice.",
        _READ,
        f"{_READ}    all_keys = np.concatenate([all_keys, split_heads(keys, heads)], axis=1)\n"
        "    all_values = np.concatenate([all_values, split_heads(values, heads)], axis=1)\n",
    ),
    Mistake(
        "keys and values exchanged",
        "Keys and values are exchanged when they are appended or read.",
        _READ,
        "    all_values, all_keys = cache.read(index)\n",
    ),
    Mistake(
        "no output projection",
        "The merged heads are returned without the output projection `layer.out`.",
        "return linear(merge_heads(heads_out), layer.out)",
        "return merge_heads(heads_out)",
    ),
    Mistake(
        "logits of the last token",
        "The logits of the last new token alone are returned. Return a row for each new token.",
        _LOGITS,
        f"{_LOGITS}[-1]",
    ),
    Mistake(
        "no final normalization",
        "The hidden states go to the head without final_norm.",
        _LOGITS,
        "return logits(hidden, weights.head)",
    ),
    Mistake(
        "no residuals",
        "Attention and feed-forward network replace the hidden states. Both are added to them.",
        _FORWARD,
        _FORWARD.replace("hidden + ", ""),
    ),
    Mistake(
        "a number for a list",
        "`forward` gets one number. It takes a list of new tokens, also where there is one: "
        "[token].",
        "new = tokens[-1:]",
        "new = tokens[-1]",
    ),
    Mistake(
        "greedy of all rows",
        "greedy gets all rows, and returns a place in the whole array. Give it the last row: "
        "rows[-1].",
        "greedy(rows[-1])",
        "greedy(rows)",
    ),
    Mistake(
        "first token lost",
        "The first new token is computed and not returned.",
        "    new = prompt_ids\n",
        "    rows = forward(np.array(prompt_ids), weights, heads, epsilon, cache)\n"
        "    new = [greedy(rows[-1])]\n",
    ),
    Mistake(
        "prompt token by token",
        "The prompt is computed in a call for each token. One call of `forward` takes all of it.",
        "    new = prompt_ids\n",
        "    for token in prompt_ids[:-1]:\n"
        "        forward(np.array([token]), weights, heads, epsilon, cache)\n"
        "    new = prompt_ids[-1:]\n",
    ),
    Mistake(
        "writes at the beginning",
        "New tokens are written at the beginning of the memory and overwrite the first ones. They "
        "go behind the tokens that the layer has.",
        _START,
        "start = 0",
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
        _RETURNED,
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
        "The shapes do not fit. Is the cache read before the new tokens are appended? Are keys and "
        "values split into heads first? Is there a position for each new token?",
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
        "The cache does not fit. It needs a place for each token of the prompt and each new one, "
        "and head_dim = d_model / heads; `forward` then gets the last token only, not the whole "
        "text again.",
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
