"""What step 4 must do, and what goes wrong."""

from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case, Mistake, require
from nanovllm.model import attention as engine
from nanovllm.model.attention import softmax
from nanovllm.model.weights import Linear


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


_ROWS = np.arange(12, dtype=np.float32).reshape(2, 6)
_HEADS, _TOKENS, _HEAD_DIM = 2, 5, 4
_QUERIES, _KEYS, _VALUES = _random(3 * _HEADS, _TOKENS, _HEAD_DIM).reshape(3, _HEADS, 5, 4)
_HIDDEN = _random(_TOKENS, _HEADS * _HEAD_DIM)
_QKV = Linear(_random(8, 24), _random(24))
_OUT = Linear(_random(8, 8), _random(8))


def _engine_weights(scale: float = 1.0, queries: int = _TOKENS) -> np.ndarray:
    """Return the engine's weights of the last queries."""
    rows = (_QUERIES * np.float32(scale)).transpose(1, 0, 2)[-queries:]
    keys = (_KEYS * np.float32(scale)).transpose(1, 0, 2)
    return softmax(engine.attention_scores(rows, keys, _HEAD_DIM**-0.5))


def _later_tokens(module: ModuleType) -> object:
    """Change the last token; nothing before it may change."""
    hidden = _HIDDEN.copy()
    before = module.self_attention(hidden, _QKV, _OUT, _HEADS)
    hidden[-1] += 10
    after = module.self_attention(hidden, _QKV, _OUT, _HEADS)
    change = float(np.abs(after[:-1] - before[:-1]).max())
    require(change == 0, f"the last token was changed, and earlier rows changed by {change:.3g}")
    return before


CASES = (
    Case(
        "columns are split into heads",
        lambda module: module.split_heads(_ROWS, 3),
        lambda: np.array([[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]], dtype="f4"),
        "Head 0 has the first head_dim columns of every row.",
    ),
    Case("merged heads are the rows again", lambda m: m.merge_heads(m.split_heads(_ROWS, 3))),
    Case("what a token must not see", lambda module: module.causal_mask(3, 3)),
    Case("two queries at the end of four keys", lambda module: module.causal_mask(2, 4)),
    Case(
        "weights of two heads",
        lambda module: module.attention_weights(_QUERIES.copy(), _KEYS.copy()),
        _engine_weights,
    ),
    Case(
        "weights of the last two queries",
        lambda module: module.attention_weights(_QUERIES[:, -2:].copy(), _KEYS.copy()),
        lambda: _engine_weights(queries=2),
    ),
    Case(
        "large scores do not overflow",
        lambda module: module.attention_weights(_QUERIES * 30, _KEYS * 30),
        lambda: _engine_weights(30.0),
        "exp(89) is more than float32 can hold.",
    ),
    Case(
        "values are mixed",
        lambda module: module.attention(_QUERIES.copy(), _KEYS.copy(), _VALUES.copy()),
    ),
    Case(
        "attention between its linear layers",
        lambda module: module.self_attention(_HIDDEN.copy(), _QKV, _OUT, _HEADS),
    ),
    Case("a later token changes nothing", _later_tokens),
)

_SCALE = "scores *= np.float32(1 / math.sqrt(queries.shape[2]))"
_MASK = "scores[:, causal_mask(scores.shape[1], scores.shape[2])] = -np.inf"
_SPLIT = "return rows.reshape(tokens, heads, d_model // heads).transpose(1, 0, 2)"
_SOFTMAX = """    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
"""
_SCORES = "scores = queries @ keys.transpose(0, 2, 1)"
_TRIU = "return np.triu(np.ones((num_queries, num_keys), dtype=np.bool_), k=first + 1)"
_MERGE = "return rows.transpose(1, 0, 2).reshape(tokens, heads * head_dim)"
_MIXED = "return attention_weights(queries, keys) @ values"
_PROJECTED = "return merge_heads(heads_out) @ out.weight + out.bias"
_LINE = "queries, keys, values = np.split(hidden @ qkv.weight + qkv.bias, 3, axis=1)"

MISTAKES = (
    Mistake(
        "no scale",
        "The scores are not divided by sqrt(head_dim). The dot product of random vectors grows "
        "with the square root of their length, and a softmax of large numbers sees one key only.",
        _SCALE,
        "pass",
    ),
    Mistake(
        "root of d_model",
        "The scores are divided by sqrt(d_model). A head's dot product has head_dim terms.",
        "math.sqrt(queries.shape[2])",
        "math.sqrt(queries.shape[0] * queries.shape[2])",
    ),
    Mistake(
        "no root",
        "The scores are divided by head_dim; divide by its square root.",
        "math.sqrt(queries.shape[2])",
        "queries.shape[2]",
    ),
    Mistake(
        "no mask",
        "Later keys are not masked, so a token sees its own future. Their scores must be -inf "
        "before the softmax.",
        _MASK,
        "pass",
    ),
    Mistake(
        "mask hides self",
        "A token's own key is masked too. The first token then has nothing left to see, and its "
        "row is NaN. Mask only later keys (k=1 for a square).",
        "k=first + 1)",
        "k=first)",
    ),
    Mistake(
        "sees one ahead",
        "Every token sees the key after its own: the mask begins one column too late.",
        "k=first + 1)",
        "k=first + 2)",
    ),
    Mistake(
        "mask ignores earlier keys",
        "The mask is right for a square only. With more keys than queries the queries are the "
        "last tokens: row 0 may see num_keys - num_queries + 1 keys.",
        "first = num_keys - num_queries",
        "first = 0",
    ),
    Mistake(
        "difference turned round",
        "The diagonal is moved to the left. Query 0 is token num_keys - num_queries, so it moves "
        "to the right by that number.",
        "first = num_keys - num_queries",
        "first = num_queries - num_keys",
    ),
    Mistake(
        "mask inverted",
        "The mask is True for the keys that may be seen.",
        _TRIU,
        _TRIU.replace("np.triu", "~np.triu"),
    ),
    Mistake(
        "mask of earlier keys",
        "The mask is True for the earlier keys, below the diagonal (np.tril). Later keys are "
        "above it: np.triu.",
        _TRIU,
        "return np.tril(np.ones((num_queries, num_keys), dtype=np.bool_), k=first - 1)",
    ),
    Mistake(
        "mask of keys and queries",
        "The mask has a row for each key. It has a row for each query and a column for each key.",
        _TRIU,
        "return np.triu(np.ones((num_keys, num_queries), dtype=np.bool_), k=1)",
    ),
    Mistake(
        "mask of numbers",
        "The mask has numbers, which is what np.ones makes. Add dtype=bool: with numbers, "
        "scores[mask] would pick elements by position.",
        _TRIU,
        "return np.triu(np.ones((num_queries, num_keys)), k=first + 1)",
    ),
    Mistake(
        "mask of minus infinity",
        "The mask has -inf for a later key, to be added to the scores. It must be True there: "
        "attention_weights sets the scores to -inf.",
        _TRIU,
        "return np.triu(np.full((num_queries, num_keys), -np.inf), k=first + 1)",
    ),
    Mistake(
        "scores multiplied by the mask",
        "The scores of later keys are set to 0. A score of 0 is not hidden: its weight is exp(0) "
        "before the division. Set it to -inf.",
        _MASK,
        "scores *= ~causal_mask(scores.shape[1], scores.shape[2])",
    ),
    Mistake(
        "zero times infinity",
        "The mask is multiplied by infinity. 0 times infinity is NaN, so every row is NaN. Assign "
        "instead: scores[:, mask] = -np.inf.",
        _MASK,
        "scores -= np.inf * causal_mask(scores.shape[1], scores.shape[2])",
    ),
    Mistake(
        "rows are keys",
        "The scores are keys @ queries^T, so a row belongs to a key. A row must belong to a query: "
        "queries @ keys^T.",
        _SCORES,
        "scores = keys @ queries.transpose(0, 2, 1)",
    ),
    Mistake(
        "shapes do not fit",
        "Two shapes do not fit. `keys.T` would reverse all three axes: keys.transpose(0, 2, 1) "
        "exchanges the last two. A maximum or sum over axis 2 needs keepdims=True, so that its "
        "shape is [heads, queries, 1].",
        _SCORES,
        "scores = queries @ keys.T",
    ),
    Mistake(
        "root of the number of tokens",
        "The scores are divided by the root of the number of tokens. Take head_dim, the last axis: "
        "queries.shape[2].",
        "math.sqrt(queries.shape[2])",
        "math.sqrt(keys.shape[1])",
    ),
    Mistake(
        "softmax over the whole array",
        "The softmax runs over the whole array, so all weights together sum to 1. Each row must: "
        "axis=2, keepdims=True for the maximum and for the sum.",
        _SOFTMAX,
        "    weights = np.exp(scores - scores.max())\n    weights /= weights.sum()\n",
    ),
    Mistake(
        "sum of the whole array",
        "The exponentials are divided by the sum of the whole array. Divide each row by its own: "
        "axis=2, keepdims=True.",
        "weights.sum(axis=2, keepdims=True)",
        "weights.sum()",
    ),
    Mistake(
        "one maximum for all rows",
        "The largest score of all rows is subtracted. Where a row lies far below it, all its "
        "exponentials are 0, and 0 / 0 is NaN. Take the maximum of each row.",
        "scores.max(axis=2, keepdims=True)",
        "scores.max()",
    ),
    Mistake(
        "mask after softmax",
        "Weights of later keys are set to 0 after the softmax, so the rows do not sum to 1. Set "
        "the scores to -inf before it.",
        f"    {_MASK}\n{_SOFTMAX}",
        f"{_SOFTMAX}    weights[:, causal_mask(scores.shape[1], scores.shape[2])] = 0\n",
    ),
    Mistake(
        "softmax over queries",
        "The softmax runs over the queries (axis 1). The weights of one query over all keys sum "
        "to 1: axis 2.",
        _SOFTMAX,
        _SOFTMAX.replace("axis=2", "axis=1"),
    ),
    Mistake(
        "softmax over heads",
        "The softmax runs over the heads (axis 0); it belongs to the keys, axis 2.",
        _SOFTMAX,
        _SOFTMAX.replace("axis=2", "axis=0"),
    ),
    Mistake(
        "maximum not subtracted",
        "The largest score is not subtracted before np.exp, which overflows: inf / inf is NaN.",
        "np.exp(scores - scores.max(axis=2, keepdims=True))",
        "np.exp(scores)",
    ),
    Mistake(
        "heads interleaved",
        "Column 0 goes to head 0, column 1 to head 1, and so on. A head has neighbouring columns: "
        "reshape to [tokens, heads, head_dim], not [tokens, head_dim, heads].",
        _SPLIT,
        "return rows.reshape(tokens, d_model // heads, heads).transpose(2, 0, 1)",
    ),
    Mistake(
        "reshape without transpose",
        "The rows are reshaped to [heads, tokens, head_dim] at once, which mixes tokens. Reshape "
        "to [tokens, heads, head_dim], then transpose.",
        _SPLIT,
        "return rows.reshape(heads, tokens, d_model // heads)",
    ),
    Mistake(
        "split without transpose",
        "The result is [tokens, heads, head_dim]. Exchange the first two axes: transpose(1, 0, 2).",
        _SPLIT,
        "return rows.reshape(tokens, heads, d_model // heads)",
    ),
    Mistake(
        "heads taken for head_dim",
        "Each head has `heads` columns. It has head_dim = d_model / heads columns.",
        _SPLIT,
        "return rows.reshape(tokens, d_model // heads, heads).transpose(1, 0, 2)",
    ),
    Mistake(
        "tokens last",
        "The result is [heads, head_dim, tokens]. The columns of a head stay the last axis.",
        _SPLIT,
        "return rows.reshape(tokens, heads, d_model // heads).transpose(1, 2, 0)",
    ),
    Mistake(
        "heads in a list",
        "The heads are returned as a list. Return one array, such as np.stack(heads).",
        _SPLIT,
        "return np.split(rows, heads, axis=1)",
    ),
    Mistake(
        "merge without transpose",
        "The heads are reshaped to [tokens, d_model] without a transpose before it.",
        _MERGE,
        "return rows.reshape(tokens, heads * head_dim)",
    ),
    Mistake(
        "columns of the heads interleaved",
        "Column 0 of every head comes first, then column 1. Put all columns of head 0 first: "
        "transpose(1, 0, 2) before the reshape.",
        _MERGE,
        "return rows.transpose(1, 2, 0).reshape(tokens, heads * head_dim)",
    ),
    Mistake(
        "keys mixed",
        "The keys are mixed by the weights. The weights say how much of each *value* is taken.",
        _MIXED,
        "return attention_weights(queries, keys) @ keys",
    ),
    Mistake(
        "weights transposed",
        "The weights are transposed before they meet the values. A row has the weights of one "
        "query: weights @ values.",
        _MIXED,
        "return attention_weights(queries, keys).transpose(0, 2, 1) @ values",
    ),
    Mistake(
        "multiplied element by element",
        "`*` multiplies element by element. The weighted mean is a matrix product: "
        "weights @ values.",
        _MIXED,
        "return attention_weights(queries, keys) * values",
    ),
    Mistake(
        "queries and keys swapped",
        "Queries and keys are exchanged: the queries are the first third of the columns.",
        _LINE,
        _LINE.replace("queries, keys", "keys, queries"),
    ),
    Mistake(
        "keys and values swapped",
        "Keys and values are exchanged: the keys are the second third of the columns.",
        _LINE,
        _LINE.replace("keys, values", "values, keys"),
    ),
    Mistake(
        "split along the tokens",
        "np.split cuts the rows. Queries, keys and values are side by side: axis=1.",
        _LINE,
        _LINE.replace(", axis=1", ""),
    ),
    Mistake(
        "grouped by head",
        "Query, key and value are taken from each head's columns in turn. GPT-2 has the queries "
        "of all heads first, then all keys, then all values.",
        _LINE,
        "both = (hidden @ qkv.weight + qkv.bias).reshape(len(hidden), heads, 3, -1)\n"
        "    queries, keys, values = (both[:, :, i].reshape(len(hidden), -1) for i in range(3))",
    ),
    Mistake("no bias", "The bias of the first projection is missing.", " + qkv.bias", ""),
    Mistake(
        "no output projection",
        "The merged heads are returned without the output projection, which mixes the heads.",
        _PROJECTED,
        "return merge_heads(heads_out)",
    ),
    Mistake(
        "no bias of the output projection",
        "The bias of the output projection is missing.",
        " + out.bias",
        "",
    ),
    Mistake(
        "reshape for merge_heads",
        "The heads are reshaped to [tokens, d_model] without a transpose: use merge_heads.",
        _PROJECTED,
        _PROJECTED.replace("merge_heads(heads_out)", "heads_out.reshape(hidden.shape)"),
    ),
    Mistake(
        "one head",
        "Attention runs over all columns as one head. Split queries, keys and values into heads "
        "before it.",
        _PROJECTED,
        "heads_out = attention(queries[None], keys[None], values[None])\n    " + _PROJECTED,
    ),
    Mistake(
        "residual added",
        "The input is added to the result. The block of step 5 does that.",
        _PROJECTED,
        _PROJECTED.replace("return", "return hidden +"),
    ),
    Mistake(
        "output projection transposed",
        "The output projection is transposed: GPT-2 stores weights as [in, out].",
        "@ out.weight + out.bias",
        "@ out.weight.T + out.bias",
    ),
)
