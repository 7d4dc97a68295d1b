"""Self-contained HTML files: the views of the server's page, with their data.

A file opens from the disk without a network. Its Content-Security-Policy allows the scripts and the
style sheets in it, by their hashes, and nothing else. Text from prompts and vocabularies is in a
block of JSON, without the characters `<`, `>` and `&`, and enters the page as text nodes.

Attention weights have 16 bits, a weight of 1 is 65,535; a file that would be too large has 8 bits.
They are compressed by gzip, which browsers unpack (DecompressionStream), and encoded by base64.
"""

import base64
import gzip
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from nanovllm.errors import InvalidRequestError
from nanovllm.inspection import responses
from nanovllm.inspection.attention import HeadStatistics
from nanovllm.inspection.bundle import bundle
from nanovllm.inspection.logit_lens import LogitLens
from nanovllm.inspection.observe import InspectedModel

MAX_FILE_BYTES = 3_000_000
_ASSETS = Path(__file__).parent / "assets"
_STYLES = (
    "style.css",
    "components.css",
    "overlays.css",
    "views.css",
    "attention.css",
    "lens.css",
    "embeddings.css",
    "file.css",
)

# Control characters and lone surrogates: invalid in HTML or impossible to encode.
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_TITLES = {
    "attention": "Attention",
    "logit-lens": "Logit lens",
    "embeddings": "Embeddings",
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
    named = responses.tokens(model, token_ids)
    overview = {"tokens": named, "heads": [responses.head_entry(one) for one in heads]}
    size = 0
    for dtype in (np.uint16, np.uint8):
        data = {
            "attention": {
                "tokens": named,
                "layers": model.config.layers,
                "heads": model.config.heads,
                "dtype": np.dtype(dtype).name,
                "encoding": "gzip",
                "layout": responses.LAYOUT,
                "layer": None,
                "weights": _pack(weights, dtype),
            },
            "overview": overview,
        }
        page = _render("attention", model, token_ids, data)
        size = _num_bytes(page)
        if size <= MAX_FILE_BYTES:
            return page
    raise InvalidRequestError(
        f"the weights of {len(heads)} heads and {len(token_ids)} tokens make a file of {size} "
        f"bytes, the limit is {MAX_FILE_BYTES}; choose some by --layers and --heads, or shorten "
        "the prompt"
    )


def lens_page(model: InspectedModel, token_ids: Sequence[int], lens: LogitLens) -> str:
    """Return the page of the logit lens; raises InvalidRequestError as `attention_page`."""
    data = responses.lens_entry(model, token_ids, lens)
    return _checked(
        _render("logit-lens", model, token_ids, data), "shorten the prompt, or lower --top"
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
    return _checked(_render("embeddings", model, token_ids, data), "lower --limit")


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


def _pack(weights: Float32[np.ndarray, "heads pairs"], dtype: Any) -> str:
    largest = np.iinfo(dtype).max
    integers = np.rint(weights * np.float32(largest)).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(gzip.compress(integers.tobytes(), 9, mtime=0)).decode("ascii")


def _render(
    kind: Literal["attention", "logit-lens", "embeddings"],
    model: InspectedModel,
    token_ids: Sequence[int],
    data: dict[str, Any],
) -> str:
    """Return the whole page."""
    theme, script, style = _asset("theme.js"), _bundle(), "\n".join(map(_asset, _STYLES))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; "
        f"script-src '{_hash(theme)}' '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    config = model.config
    title = f"{_TITLES[kind]} · {model.name}"
    shape = f"{config.layers} layers, {config.heads} heads, {config.d_model} dimensions"
    prompt = model.tokenizer.decode(token_ids, skip_special_tokens=False)
    content = json.dumps({"kind": kind, **data}, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{_escape(title)}</title>
<style>{style}</style>
<script>{theme}</script>
</head>
<body>
<header class="file-header">
<h1>{_escape(_TITLES[kind])}</h1>
<p class="secondary">{_escape(f"{model.name}: {shape}")}</p>
<div id="actions"></div>
</header>
<main id="main" class="file-main">
{f'<p class="file-prompt" tabindex="0">{_escape(prompt)}</p>' if prompt else ""}
<noscript><p>This page needs JavaScript.</p></noscript>
</main>
<script type="application/json" id="data">{content}</script>
<script>{script}</script>
</body>
</html>
"""


def _num_bytes(page: str) -> int:
    return len(page.encode())


def _escape(text: str) -> str:
    """Return text as HTML; characters that HTML cannot have become U+FFFD."""
    return html.escape(_INVALID.sub("\ufffd", text))


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    return bundle(_ASSETS, "file.js")


@cache
def _hash(text: str) -> str:
    """Return the hash of an inline script or style sheet for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
