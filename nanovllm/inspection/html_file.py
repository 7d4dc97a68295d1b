"""Self-contained HTML files of inspection: the views of the server's page, with their data.

Attention weights have 16 bits, a weight of 1 is 65,535; a file that would be too large has 8 bits.
They are compressed by gzip, which browsers unpack (DecompressionStream), and encoded by base64.
"""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError, counted
from nanovllm.inspection import responses
from nanovllm.inspection.attention import HeadStatistics
from nanovllm.inspection.observe import InspectedModel
from nanovllm.model.config import ModelConfig
from nanovllm.pages import render_page

MAX_FILE_BYTES = 3_000_000
_STYLES = (
    "elements/overlays.css",
    "charts/charts.css",
    *(
        f"inspection/{name}.css"
        for name in ("views", "attention", "lens", "embeddings", "ablation")
    ),
)
_TITLES = {
    "attention": "Attention",
    "logit-lens": "Logit lens",
    "embeddings": "Embeddings",
    "ablation": "Parts switched off",
}


def attention_page(
    model: InspectedModel,
    token_ids: Sequence[int],
    weights: Float32[np.ndarray, "heads pairs"],
    heads: Sequence[HeadStatistics],
) -> str:
    """Return the page of some heads' attention weights, in the order of `heads`.

    Raises InvalidRequestError if it would exceed MAX_FILE_BYTES.
    """
    overview = responses.overview_entry(model, token_ids, heads)
    size = 0
    for dtype in (np.uint16, np.uint8):
        packed = responses.attention_entry(
            model, token_ids, _pack(weights, dtype), dtype=np.dtype(dtype).name
        )
        data = {"attention": {**packed, "encoding": "gzip"}, "overview": overview}
        page = _render_prompt("attention", model, token_ids, data)
        size = _num_bytes(page)
        if size <= MAX_FILE_BYTES:
            return page
    raise InvalidRequestError(
        f"the weights of {len(heads)} heads and {len(token_ids)} tokens make a file of {size} "
        f"bytes, the limit is {MAX_FILE_BYTES}; choose some by --layers and --heads, or shorten "
        "the prompt"
    )


def lens_page(model: InspectedModel, token_ids: Sequence[int], lens: dict[str, Any]) -> str:
    """Return the page of the logit lens; raises InvalidRequestError as `attention_page`."""
    return _checked(
        _render_prompt("logit-lens", model, token_ids, lens), "shorten the prompt, or lower --top"
    )


def embeddings_page(
    model: InspectedModel,
    projections: dict[str, dict[str, Any]],
    neighbors: dict[int, list[dict[str, Any]]],
    token_ids: Sequence[int],
) -> str:
    """Return the page of projections {method: response}; raises as `attention_page`.

    `neighbors` are those of each point; `token_ids` the tokens of a prompt, or none.
    """
    data = {"projections": projections, "neighbors": neighbors, "marked": list(token_ids)}
    return _checked(_render_prompt("embeddings", model, token_ids, data), "lower --limit")


def ablation_page(name: str, config: ModelConfig, entry: dict[str, Any], intro: str) -> str:
    """Return the page of the losses without each part; raises as `attention_page`.

    `entry` is that of `responses.ablation_entry`; `intro` says of which text.
    """
    return _checked(_render("ablation", name, config, entry, intro), "choose some by --parts")


def write_page(page: str, path: Path) -> None:
    """Write a page to a file at once: a failure leaves an older file as it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(page: str, remedy: str) -> str:
    if (size := _num_bytes(page)) > MAX_FILE_BYTES:
        raise InvalidRequestError(
            f"the file would have {size} bytes, the limit is {MAX_FILE_BYTES}; {remedy}"
        )
    return page


def _pack(weights: Float32[np.ndarray, "heads pairs"], dtype: Any) -> bytes:
    largest = np.iinfo(dtype).max
    integers = np.rint(weights * np.float32(largest)).astype(np.dtype(dtype).newbyteorder("<"))
    return gzip.compress(integers.tobytes(), 9, mtime=0)


def _render_prompt(
    kind: str, model: InspectedModel, token_ids: Sequence[int], data: dict[str, Any]
) -> str:
    prompt = model.tokenizer.decode(token_ids, skip_special_tokens=False)
    return _render(kind, model.name, model.config, data, prompt)


def _render(kind: str, name: str, config: ModelConfig, data: dict[str, Any], intro: str) -> str:
    return render_page(
        title=f"{_TITLES[kind]} · {name}",
        heading=_TITLES[kind],
        subtitle=f"{name}: {counted(config.layers, 'layer')}, {counted(config.heads, 'head')}, "
        f"{config.d_model} dimensions",
        script="inspection/file.js",
        styles=_STYLES,
        data={"kind": kind, **data},
        intro=intro,
    )


def _num_bytes(page: str) -> int:
    return len(page.encode())
