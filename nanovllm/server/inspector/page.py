"""Serve the inspector's page at `/` and its assets under /inspector/DIGEST/.

The digest is of all assets together. Modules import each other by relative addresses, so they all
come from the same digest, and a browser may keep them for ever. The address of a script ends with
the path of its file in nanovllm/pages/assets; the style sheets are joined to one. The page contains
neither keys nor user text and is public also where calls need an API key, which it asks for.
"""

import hashlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from nanovllm import __version__
from nanovllm.pages import ASSETS
from nanovllm.server.http.docs_page import (
    ASSET_HEADERS,
    MEDIA_TYPES,
    PAGE_HEADERS,
    add_static_route,
)

_STYLES = (
    *("elements/style", "elements/components", "elements/overlays", "charts/charts"),
    *("inspector/frame", "inspection/views", "inspection/attention", "inspection/head_row"),
    *("inspection/lens", "inspection/embeddings", "inspection/ablation"),
    *("engine/engine", "engine/request_list"),
    *("playground/playground", "playground/token_text", "playground/chat"),
)
_POLICY = "; require-trusted-types-for 'script'; trusted-types 'none'"
_OWN_HEADERS = {
    # Trusted types make the browser refuse innerHTML and the like: text is only ever text.
    "content-security-policy": PAGE_HEADERS["content-security-policy"] + _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def add_page(app: FastAPI) -> None:
    """Add `/` and the assets of the inspector's page."""
    headers = {**PAGE_HEADERS, **_OWN_HEADERS, "cache-control": "no-cache"}
    add_static_route(app, "/", partial(HTMLResponse, _page(), headers=headers))
    headers = {**ASSET_HEADERS, **_OWN_HEADERS}
    for name, content in _assets().items():
        media_type = MEDIA_TYPES[Path(name).suffix]
        asset = partial(Response, content, headers=headers, media_type=media_type)
        add_static_route(app, f"/{_asset_folder()}{name}", asset)


def public_paths() -> frozenset[str]:
    """Return the paths of the page and its assets, which need no API key."""
    return frozenset({"/", *(f"/{_asset_folder()}{name}" for name in _assets())})


def _page() -> str:
    """Return the page with relative addresses, which also work behind a proxy's path prefix."""
    template = (ASSETS / "inspector/index.html").read_text(encoding="utf-8")
    return template.replace("{assets}", _asset_folder()).replace("{version}", __version__)


@cache
def _asset_folder() -> str:
    digest = hashlib.sha256()
    for name, content in _assets().items():
        digest.update(b"%s %d\n%s" % (name.encode(), len(content), content))
    return f"inspector/{digest.hexdigest()[:16]}/"


@cache
def _assets() -> Mapping[str, bytes]:
    """Return the scripts by path, those of self-contained files included, and the style sheet."""
    paths = sorted(ASSETS.rglob("*.js"))
    scripts = {path.relative_to(ASSETS).as_posix(): path.read_bytes() for path in paths}
    style = b"\n".join((ASSETS / f"{name}.css").read_bytes() for name in _STYLES)
    return {**scripts, "style.css": style}
