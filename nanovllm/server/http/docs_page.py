"""Serve `/docs`, Swagger UI, and an index of endpoints, without other hosts.

Swagger UI is part of the package (docs_assets/README.md), so that /docs works without a network.
The pages contain neither keys nor user text. They are public also where calls need an API key,
which a visitor enters under Authorize.
"""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from html import escape
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from nanovllm import __version__

_FOLDER = Path(__file__).parent / "docs_assets"
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}
_ASSET_PATHS = {
    file.name: f"/docs/assets/{file.name}"
    for file in _FOLDER.iterdir()
    if file.suffix in MEDIA_TYPES
}
PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json", *_ASSET_PATHS.values()})

PAGE_HEADERS = {
    # The style sheet of Swagger UI contains images as data: addresses.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# The address of an asset contains its digest, so that a browser may keep it for ever.
ASSET_HEADERS = {**PAGE_HEADERS, "cache-control": "public, max-age=31536000, immutable"}


def add_docs_pages(app: FastAPI, *, has_index: bool = True) -> None:
    """Add `/docs`, `/` with `has_index`, and assets; the other routes must be there already."""
    pages = {"/docs": _swagger_ui(), **({"/": _index(app)} if has_index else {})}
    for path, page in pages.items():
        add_static_route(app, path, partial(HTMLResponse, page, headers=PAGE_HEADERS))
    for name, path in _ASSET_PATHS.items():
        file = _FOLDER / name
        asset = partial(
            FileResponse, file, headers=ASSET_HEADERS, media_type=MEDIA_TYPES[file.suffix]
        )
        add_static_route(app, path, asset)


def add_static_route(app: FastAPI, path: str, response: Callable[[], Response]) -> None:
    """Add a GET route that has the same response for every request."""

    async def send(request: Request) -> Response:
        return response()

    app.add_route(path, send, include_in_schema=False)


def _index(app: FastAPI) -> str:
    rows = (
        f"<tr><td><code>{method} {escape(route.path_format)}</code></td>"
        f"<td>{escape(route.description.partition(chr(10))[0])}</td></tr>"
        for route in app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in sorted(route.methods or ())
    )
    return _page(
        f"nanovllm {__version__}",
        f'<link rel="stylesheet" href="{_address("page.css")}">',
        f"<h1>nanovllm {__version__}</h1>\n"
        '<p>An OpenAI-compatible server. <a href="docs">/docs</a> describes every field and sends '
        "requests from the browser. The base URL for clients is this address followed by "
        f"<code>/v1</code>.</p>\n<table>\n{chr(10).join(rows)}\n</table>",
    )


def _swagger_ui() -> str:
    return _page(
        "nanovllm API",
        f'<link rel="stylesheet" href="{_address("swagger-ui.css")}">\n'
        f'<script src="{_address("swagger-ui-bundle.js")}"></script>\n'
        f'<script src="{_address("start.js")}"></script>',
        '<div id="swagger-ui"></div>',
    )


def _page(title: str, head: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


@cache
def _address(name: str) -> str:
    """Return the relative address of an asset, which also works behind a proxy's path prefix."""
    digest = hashlib.sha256((_FOLDER / name).read_bytes()).hexdigest()[:16]
    return f"{_ASSET_PATHS[name].removeprefix('/')}?v={digest}"
