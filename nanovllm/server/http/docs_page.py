"""Serve `/docs`, Swagger UI, and an index of endpoints, without other hosts.

Swagger UI is part of the package (docs_assets/README.md), so that /docs works without a network.
The pages contain neither keys nor user text. They are public also where calls need an API key,
which a visitor enters under Authorize.
"""

import functools
import hashlib
from collections.abc import Awaitable, Callable
from html import escape
from pathlib import Path

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from nanovllm import __version__

_FOLDER = Path(__file__).parent / "docs_assets"
_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "page.css": "text/css",
}
_ASSET_PATHS = {name: f"/docs/assets/{name}" for name in _MEDIA_TYPES}
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

_Endpoint = Callable[[Request], Awaitable[Response]]


def add_docs_pages(app: FastAPI, *, has_index: bool = True) -> None:
    """Add `/docs`, `/` with `has_index`, and assets; the other routes must be there already."""
    app.add_route("/docs", _page_endpoint(_swagger_ui()), include_in_schema=False)
    if has_index:
        app.add_route("/", _page_endpoint(_index(app)), include_in_schema=False)
    for name, path in _ASSET_PATHS.items():
        app.add_route(path, _asset_endpoint(name), include_in_schema=False)


def _page_endpoint(page: str) -> _Endpoint:
    async def send_page(request: Request) -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return send_page


def _asset_endpoint(name: str) -> _Endpoint:
    async def send_asset(request: Request) -> Response:
        return FileResponse(_FOLDER / name, headers=ASSET_HEADERS, media_type=_MEDIA_TYPES[name])

    return send_asset


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


@functools.cache
def _address(name: str) -> str:
    """Return the relative address of an asset, which also works behind a proxy's path prefix."""
    digest = hashlib.sha256((_FOLDER / name).read_bytes()).hexdigest()[:16]
    return f"{_ASSET_PATHS[name].removeprefix('/')}?v={digest}"
