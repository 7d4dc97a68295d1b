"""Attention weights of every layer and head, and statistics that tell heads apart.

A(l, h)[q, k] is the weight of key k for query q: softmax(scale * Q K^T), 0 for k > q. Drawing A as
a map goes back to Bahdanau et al. 2015 (arXiv:1409.0473, figure 3); BertViz (Vig 2019,
arXiv:1906.05714) draws it for every head of GPT-2. A weight shows where a head reads, not what the
prediction depends on (Jain and Wallace 2019, arXiv:1902.10186).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from nanovllm.errors import InvalidRequestError, describe_value
from nanovllm.inspection.observe import InspectedModel, rounded
from nanovllm.model.config import ModelConfig

MAX_WEIGHTS_BYTES = 64 << 20
MIN_KIND_TOKENS = 4  # minimum prompt length for the kinds of head
_SKIPPED_QUERIES = 2  # the previous token of query 1 is the first one


@dataclass(frozen=True, slots=True)
class HeadStatistics:
    """Means over the queries of a prompt, without the first query, which sees one key only.

    With x[i] the token at position i and A the weights of the head:

    Attributes:
        layer: from 0.
        head: from 0.
        entropy: -sum_k A[q, k] ln A[q, k], in nats; 0 for a head that reads one token.
        previous_token: A[q, q - 1], mean over q >= 2: for q = 1 this is A[q, 0].
        first_token: A[q, 0], mean over q >= 2, the "attention sink" (Xiao et al. 2024,
            arXiv:2309.17453).
        self: A[q, q], mean over q >= 2.
        distance: sum_k A[q, k] (q - k), in tokens.
        induction: sum of A[q, k] over keys 1 <= k < q with x[k - 1] = x[q]: the weight on tokens
            that followed earlier occurrences of the query's token (the prefix matching score of
            Olsson et al. 2022, arXiv:2209.11895). Mean over the queries with such keys; None
            without any.

    `previous_token`, `first_token` and `self` are None for a prompt of fewer than MIN_KIND_TOKENS
    tokens, `entropy` and `distance` for one of one token.
    """

    layer: int
    head: int
    entropy: float | None
    previous_token: float | None
    first_token: float | None
    self: float | None
    distance: float | None
    induction: float | None


@dataclass(frozen=True, slots=True)
class AttentionHead:
    """How one head computes the output of one query.

        scores = scale * keys @ query     weights = softmax(scores)     output = weights @ values

    Attributes:
        scale: factor of the scores, usually 1 / sqrt(head_dim).
        keys, values: of the tokens up to the query.
    """

    scale: float
    query: Float32[np.ndarray, " head_dim"]
    keys: Float32[np.ndarray, "context head_dim"]
    values: Float32[np.ndarray, "context head_dim"]
    scores: Float32[np.ndarray, " context"]
    weights: Float32[np.ndarray, " context"]
    output: Float32[np.ndarray, " head_dim"]


def attention_head(
    model: InspectedModel, token_ids: Sequence[int], layer: int, head: int, position: int
) -> AttentionHead:
    """Return the arrays of a head for the query at a position of the prompt.

    Raises InvalidRequestError if there is no such layer, head or position.
    """
    config = model.config
    check_index("layer", layer, config.layers, "the model has the layers")
    check_index("head", head, config.heads, "the model has the heads")
    check_index("query", position, len(token_ids), "the prompt has the positions")
    seen = slice(position + 1)
    parts: dict[str, np.ndarray] = {}

    def observe(name: str, index: int | None, array: np.ndarray) -> None:
        if index != layer:
            return
        if name in ("queries", "keys", "values"):
            parts[name] = array[:, head].copy()
        elif name in ("attention_scores", "attention_weights"):
            parts[name] = array[head, position, seen].copy()
        elif name == "attn_out":
            parts[name] = np.split(array[position], config.heads)[head].copy()

    model.forward(token_ids, observe)
    return AttentionHead(
        config.attention_scale(layer),
        parts["queries"][position],
        parts["keys"][seen],
        parts["values"][seen],
        parts["attention_scores"],
        parts["attention_weights"],
        parts["attn_out"],
    )


def check_index(param: str, index: int, count: int, what: str) -> None:
    """Raise InvalidRequestError unless `index` is from 0 to `count` - 1.

    `param` may name a field of an entry of a list, as "off.3.layer".
    """
    if not 0 <= index < count:
        raise InvalidRequestError(
            f"{param} is {describe_value(index)}, but {what} 0 to {count - 1}",
            param=param.split(".", 1)[0],
        )


def attention_weights(
    model: InspectedModel, token_ids: Sequence[int], layer: int | None = None
) -> Float32[np.ndarray, "layers heads pairs"]:
    """Return the weights of one layer, or of all, without the zeros above the diagonal.

    A pair is a query and a key that it sees: query q and key k are pair q (q + 1) / 2 + k.

    Raises InvalidRequestError if there is no such layer, or if the result would exceed
    MAX_WEIGHTS_BYTES.
    """
    config = model.config
    if layer is not None:
        check_index("layer", layer, config.layers, "the model has the layers")
    num_layers = config.layers if layer is None else 1
    pairs = len(token_ids) * (len(token_ids) + 1) // 2
    num_bytes = packed_weights_bytes(config, len(token_ids), num_layers)
    if num_bytes > MAX_WEIGHTS_BYTES:
        remedy = "ask for one layer at a time" if layer is None else "shorten the prompt"
        raise InvalidRequestError(
            f"the weights of {num_layers} layers and {len(token_ids)} tokens are {num_bytes} "
            f"bytes, the limit is {MAX_WEIGHTS_BYTES}; {remedy}",
            param="layer" if layer is None else "prompt",
        )
    packed = np.empty((num_layers, config.heads, pairs), dtype=np.float32)
    queries, keys = np.tril_indices(len(token_ids))

    def observe(name: str, index: int | None, array: np.ndarray) -> None:
        if name == "attention_weights" and (layer is None or index == layer):
            assert index is not None
            packed[index if layer is None else 0] = array[:, queries, keys]

    model.forward(token_ids, observe)
    return packed


def packed_weights_bytes(config: ModelConfig, tokens: int, layers: int) -> int:
    """Return the size of the result of `attention_weights`."""
    return layers * config.heads * tokens * (tokens + 1) // 2 * np.dtype(np.float32).itemsize


def head_statistics(model: InspectedModel, token_ids: Sequence[int]) -> list[HeadStatistics]:
    """Return the statistics of every head on a prompt, layer by layer."""
    statistics: list[HeadStatistics] = []

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        if name == "attention_weights":
            assert layer is not None
            statistics.extend(describe_heads(layer, array, token_ids))

    model.forward(token_ids, observe)
    return statistics


def describe_heads(
    layer: int, weights: Float32[np.ndarray, "heads queries keys"], token_ids: Sequence[int]
) -> list[HeadStatistics]:
    """Return the statistics of a layer's heads, rounded."""
    count = len(token_ids)
    positions = np.arange(count, dtype=np.int64)
    if count == 1:
        none = dict.fromkeys(
            ("entropy", "previous_token", "first_token", "self", "distance", "induction")
        )
        return [HeadStatistics(layer, head, **none) for head in range(len(weights))]
    seen = weights[:, 1:].astype(np.float64)  # without the first query
    with np.errstate(divide="ignore", invalid="ignore"):
        entropies = 0.0 - np.where(seen > 0, seen * np.log(seen), 0.0).sum(axis=2)
    distances = seen @ -positions.astype(np.float64) + seen.sum(axis=2) * positions[1:]
    follows = _follows_earlier_occurrence(token_ids)[1:]
    has_repeat = follows.any(axis=1)
    induction = (
        (seen * follows).sum(axis=2)[:, has_repeat].mean(axis=1).tolist()
        if has_repeat.any()
        else [None] * len(weights)
    )
    kinds: list[list[float | None]] = [[None] * len(weights)] * 3
    if count >= MIN_KIND_TOKENS:
        queries = positions[_SKIPPED_QUERIES:]
        columns = (queries - 1, np.zeros_like(queries), queries)
        kinds = [
            weights[:, queries, keys].mean(axis=1, dtype=np.float64).tolist() for keys in columns
        ]
    means = zip(
        entropies.mean(axis=1).tolist(),
        *kinds,
        distances.mean(axis=1).tolist(),
        induction,
        strict=True,
    )
    return [
        HeadStatistics(layer, head, *(None if one is None else rounded(one) for one in values))
        for head, values in enumerate(means)
    ]


def _follows_earlier_occurrence(token_ids: Sequence[int]) -> Bool[np.ndarray, "queries keys"]:
    """Return whether key k comes directly after an earlier occurrence of query q's token."""
    tokens = np.array(token_ids, dtype=np.int64)
    follows = np.zeros((len(tokens), len(tokens)), dtype=np.bool_)
    follows[:, 1:] = tokens[:, None] == tokens[None, :-1]
    return np.tril(follows, k=-1)
