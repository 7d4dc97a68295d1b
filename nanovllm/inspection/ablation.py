"""The loss and the predictions of one prompt with parts of the network switched off.

The loss is the mean of -ln p over the prompt's tokens but the first, in nats.
"""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.attention import check_index
from nanovllm.inspection.logit_lens import (
    CHUNK_ROWS,
    DEFAULT_TOP,
    check_top,
    lens_logprobs,
    predictions,
)
from nanovllm.inspection.observe import JSON, InspectedModel, check_finite, rounded
from nanovllm.model.ablation import Part, block_without, parts_of, without
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import block, embed
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.observer import ignore

MAX_PARTS = 2048
"""Maximum parts that a request switches off; GPT-2 XL has 1,344."""
MAX_MULTIPLICATIONS = 2_500_000_000_000
"""Maximum of the losses without each part in turn: 80 to 90 s of a processor core."""


def read_part(
    config: ModelConfig, index: int, layer: int, kind: Any, head: int | None = None
) -> Part:
    """Return the part at an index of `off`; raises InvalidRequestError if there is no such part."""
    entry = f"off.{index}"
    check_index(f"{entry}.layer", layer, config.layers, "the model has the layers")
    if (kind == "head") is (head is None):
        raise InvalidRequestError(
            f"{entry} has the kind {kind!r} {'without' if head is None else 'with'} a head; give a "
            "head for the kind 'head' only",
            param="off",
        )
    if head is not None:
        check_index(f"{entry}.head", head, config.heads, "the model has the heads")
    return Part(layer, kind, head)


def predict_without(
    model: InspectedModel,
    token_ids: Sequence[int],
    parts: Collection[Part],
    top: int = DEFAULT_TOP,
) -> JSON:
    """Return the loss of a prompt, None for one token, and the prediction at each position.

    The `cells` are those of `logit_lens.predictions`. Raises InvalidRequestError unless `top` is 1
    to MAX_TOP.
    """
    check_top(top)
    weights = without(model.weights, model.config, parts)
    streams: list[np.ndarray] = []

    def observe(name: str, layer: int | None, array: np.ndarray) -> None:
        if name == "hidden_after_ffn" and layer == model.config.layers - 1:
            streams.append(array)

    replace(model, weights=weights).forward(token_ids, observe)
    return {
        "loss": _loss(model, streams[0], token_ids),
        "cells": list(predictions(model, streams[0], token_ids, top)),
    }


def losses_without_each(
    model: InspectedModel, token_ids: Sequence[int]
) -> tuple[float | None, dict[Part, float | None]]:
    """Return the loss of a prompt, and that without each part in turn; None for one token.

    Raises InvalidRequestError if that needs more than MAX_MULTIPLICATIONS.
    """
    check_work(model.config, len(token_ids))
    streams = streams_without_each(model, token_ids, parts_of(model.config))
    losses = {part: _loss(model, hidden, token_ids) for part, hidden in streams.items()}
    whole = losses[None]
    return whole, {part: loss for part, loss in losses.items() if part is not None}


def check_work(config: ModelConfig, tokens: int) -> None:
    """Raise InvalidRequestError if a prompt is too long for the loss without each part in turn."""
    num_parts = len(parts_of(config))
    # The streams of a layer: the whole network, and one for each part up to this layer.
    num_blocks = config.layers + num_parts * (config.layers + 1) // 2
    block_weights = config.block_weights

    def multiplications(tokens: int) -> int:
        per_block = block_weights + 2 * tokens * config.queries_width
        return tokens * (num_blocks * per_block + (num_parts + 1) * config.vocab * config.d_model)

    if multiplications(tokens) > MAX_MULTIPLICATIONS:
        limit = bisect_right(range(tokens), MAX_MULTIPLICATIONS, key=multiplications) - 1
        raise InvalidRequestError(
            f"the prompt has {tokens} tokens; to measure each of the {num_parts} parts of this "
            f"model, it may have up to {limit}: shorten it, or use nanovllm ablate",
            param="prompt",
        )


@np.errstate(over="ignore", invalid="ignore")
def streams_without_each(
    model: InspectedModel, token_ids: Sequence[int], parts: Collection[Part]
) -> dict[Part | None, Float32[np.ndarray, "tokens d_model"]]:
    """Return the residual stream after the last layer without each part in turn.

    The key None is the whole network. The stream without a part branches off at the part's layer,
    so what is below is computed once, and a layer is read once for all streams.
    """
    config, weights = model.config, model.weights
    cache = KVCache.allocate(config, blocks=1, block_size=len(token_ids))
    batch = ForwardBatch.single(token_ids, all_rows=True)
    whole = embed(config, weights, batch)
    streams: dict[Part | None, np.ndarray] = {None: whole}
    for layer, layer_weights in enumerate(weights.layers):
        whole = streams[None]
        for part, hidden in streams.items():
            streams[part] = block(config, layer_weights, layer, hidden, batch, cache, ignore)
        for part in parts:
            if part.layer == layer:
                used = block_without(layer_weights, config, [part])
                streams[part] = block(config, used, layer, whole, batch, cache, ignore)
    return streams


def _loss(
    model: InspectedModel,
    hidden: Float32[np.ndarray, "tokens d_model"],
    token_ids: Sequence[int],
) -> float | None:
    """Return the loss of a prompt from its residual stream, which must be finite."""
    check_finite(hidden)
    if len(token_ids) == 1:
        return None
    targets = np.array(token_ids[1:], dtype=np.int64)
    total = 0.0
    for start in range(0, len(targets), CHUNK_ROWS):
        next_ids = targets[start : start + CHUNK_ROWS]
        logprobs = lens_logprobs(model, hidden[start : start + len(next_ids)])
        total -= float(logprobs[np.arange(len(next_ids)), next_ids].sum(dtype=np.float64))
    return rounded(total / len(targets))
