"""Results of inspection as JSON objects: the bodies of /v1/inspect/*, and the data of HTML files.

Numbers have seven significant digits, as many as a float32.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection.ablation import losses_without_each, predict_without, read_part
from nanovllm.inspection.attention import (
    HeadStatistics,
    attention_head,
    attention_weights,
    head_statistics,
)
from nanovllm.inspection.embeddings import (
    DEFAULT_POINTS,
    Method,
    Projection,
    available_methods,
    neighbors,
    project,
)
from nanovllm.inspection.logit_lens import DEFAULT_TOP, logit_lens
from nanovllm.inspection.memory import MAX_MEMORY_BYTES, check_memory
from nanovllm.inspection.observe import JSON, InspectedModel, rounded
from nanovllm.model.ablation import Part
from nanovllm.model.config import ModelConfig

LAYOUT = "lower-triangular rows, [layer, head, query, key<=query]"


def _attention(model: InspectedModel, prompt: Sequence[int], layer: int | None = None) -> JSON:
    """Return the attention weights of one layer, or of all, in base64 of little-endian float32."""
    weights = attention_weights(model, prompt, layer)
    return attention_entry(model, prompt, weights.astype("<f4", copy=False).data, layer=layer)


def attention_entry(
    model: InspectedModel,
    token_ids: Sequence[int],
    weights: bytes | memoryview,
    *,
    layer: int | None = None,
    dtype: str = "float32",
) -> JSON:
    """Return attention weights of a `dtype`, little-endian, as the response of `attention`."""
    return {
        "tokens": tokens(model, token_ids),
        "layers": model.config.layers,
        "heads": model.config.heads,
        "dtype": dtype,
        "layout": LAYOUT,
        "layer": layer,
        "weights": base64.b64encode(weights).decode("ascii"),
    }


def _attention_head(
    model: InspectedModel,
    prompt: Sequence[int],
    layer: int = 0,
    head: int = 0,
    query: int | None = None,
) -> JSON:
    """Return how a head computes the output of a query, by default of the last token."""
    query = len(prompt) - 1 if query is None else query
    result = attention_head(model, prompt, layer, head, query)
    return {
        "tokens": tokens(model, prompt),
        "layer": layer,
        "head": head,
        "query": query,
        "scale": rounded(result.scale),
        "q": _numbers(result.query),
        "k": [_numbers(key) for key in result.keys],
        "v": [_numbers(value) for value in result.values],
        "scores": _numbers(result.scores),
        "weights": _numbers(result.weights),
        "output": _numbers(result.output),
    }


def _overview(model: InspectedModel, prompt: Sequence[int]) -> JSON:
    """Return the statistics of every head."""
    return overview_entry(model, prompt, head_statistics(model, prompt))


def overview_entry(
    model: InspectedModel, token_ids: Sequence[int], heads: Sequence[HeadStatistics]
) -> JSON:
    """Return statistics of heads as the response of `overview`."""
    return {"tokens": tokens(model, token_ids), "heads": [asdict(head) for head in heads]}


def _ablation(
    model: InspectedModel,
    prompt: Sequence[int],
    off: Sequence[Mapping[str, Any]] = (),
    top: int = DEFAULT_TOP,
) -> JSON:
    """Return the predictions of the whole network, and those without the parts in `off`."""
    parts = [read_part(model.config, index, **part) for index, part in enumerate(off)]
    whole = predict_without(model, prompt, (), top)
    return {
        "tokens": tokens(model, prompt),
        "layers": model.config.layers,
        "heads": model.config.heads,
        "off": [asdict(part) for part in parts],
        "whole": whole,
        "ablated": predict_without(model, prompt, parts, top) if parts else whole,
    }


def _ablation_map(model: InspectedModel, prompt: Sequence[int]) -> JSON:
    """Return the loss without each part in turn."""
    entry = ablation_entry(model.config, *losses_without_each(model, prompt))
    return {"tokens": tokens(model, prompt), **entry}


def ablation_entry(
    config: ModelConfig, loss: float | None, losses: Mapping[Part, float | None]
) -> JSON:
    """Return the loss of the whole network and without each part, in nats per token."""
    return {
        "layers": config.layers,
        "heads": config.heads,
        "loss": loss,
        "parts": [{**asdict(part), "loss": each} for part, each in losses.items()],
    }


def _embeddings(model: InspectedModel, method: Method = "pca", limit: int = DEFAULT_POINTS) -> JSON:
    """Return the points of tokens in the plane, and the methods that can be asked for."""
    entry = projection_entry(model, method, project(model, method, limit))
    return {**entry, "methods": available_methods()}


def projection_entry(model: InspectedModel, method: str, result: Projection) -> JSON:
    """Return a projection as the response of `embeddings`."""
    explained = result.explained
    named = tokens(model, result.token_ids)
    return {
        "method": method,
        "explained": None if explained is None else [rounded(part) for part in explained],
        "vocab": model.config.vocab,
        "points": [
            {**token, "x": rounded(x), "y": rounded(y)}
            for token, (x, y) in zip(named, result.points.tolist(), strict=True)
        ],
    }


def _neighbors(
    model: InspectedModel, token: int | None = None, text: str | None = None, count: int = 10
) -> JSON:
    """Return the nearest tokens of a token, by its id or by its text.

    Raises InvalidRequestError unless exactly one of them is given, and the text is one token.
    """
    if (token is None) == (text is None):
        raise InvalidRequestError("give one of token (an id) and text", param="token")
    if text is not None:
        token_ids = model.encode(text, add_special_tokens=False)
        if len(token_ids) > 1:
            first = model.tokenizer.token_text(token_ids[0])
            raise InvalidRequestError(
                f"the text is {len(token_ids)} tokens, the first of which is {first!r}; give the "
                "text of one token",
                param="text",
            )
        token = token_ids[0]
    assert token is not None
    found = neighbors(model, token, count)  # checks the token
    return {"token": tokens(model, [token])[0], "neighbors": neighbor_entries(model, found)}


def neighbor_entries(model: InspectedModel, found: Sequence[tuple[int, float]]) -> list[JSON]:
    """Return tokens with their cosines, four digits each."""
    named = tokens(model, [token_id for token_id, _ in found])
    return [
        {**token, "cosine": round(cosine, 4)}
        for token, (_, cosine) in zip(named, found, strict=True)
    ]


def tokens(model: InspectedModel, token_ids: Sequence[int]) -> list[JSON]:
    """Return the id and text of each token, and its bytes if they are not valid UTF-8."""
    return [*map(model.token, token_ids)]


def run(
    model: InspectedModel,
    name: str,
    arguments: Mapping[str, Any],
    max_memory_bytes: int = MAX_MEMORY_BYTES,
) -> JSON:
    """Return the response of the endpoint `name` to these arguments.

    Raises as the endpoint's function does, and InvalidRequestError if it needs more memory.
    """
    if "prompt" in arguments:
        arguments = {**arguments, "prompt": model.encode(arguments["prompt"])}
    check_memory(model.config, name, arguments, max_memory_bytes)
    return _ANSWERS[name](model, **arguments)


_ANSWERS: dict[str, Callable[..., JSON]] = {
    "attention": _attention, "attention_head": _attention_head, "overview": _overview,
    "logit_lens": logit_lens, "ablation": _ablation, "ablation_map": _ablation_map,
    "embeddings": _embeddings, "neighbors": _neighbors,
}  # fmt: skip


def _numbers(array: np.ndarray) -> list[float]:
    return [*map(rounded, array.tolist())]
