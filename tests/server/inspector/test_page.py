"""The inspector's page over plain HTTP: headers, caching, and that it has everything it loads."""

import asyncio
import posixpath
import re
from pathlib import Path

import httpx
from starlette.types import ASGIApp

import nanovllm
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.server.app import create_app
from nanovllm.server.inspector import page
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.service import ServerSettings
from tests.support.serving import MODEL, RunningServer, loader

_IMPORT = re.compile(r'(?:from|import)\s+"(\.{1,2}/[\w./]+)"')
_ADDRESS = re.compile(r"(?:https?:)?//[\w-]+\.\w+[\w./-]*")
_SVG = "http://www.w3.org/2000/svg"


def assets_of(server: RunningServer) -> dict[str, httpx.Response]:
    return {
        path.split("/", 3)[3]: server.http.get(path) for path in sorted(page.public_paths() - {"/"})
    }


def test_the_policy_allows_nothing_but_the_servers_own_scripts_and_styles(
    server: RunningServer,
) -> None:
    response = server.http.get("/")
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in response.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'",
        "img-src": "'self' data:", "connect-src": "'self'", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert "access-control-allow-origin" not in response.headers
    assert " style=" not in response.text
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=", response.text)


def test_a_browser_keeps_assets_but_asks_for_the_page_again(server: RunningServer) -> None:
    response = server.http.get("/")
    assert response.headers["cache-control"] == "no-cache"
    [folder] = set(re.findall(r'"(inspector/[0-9a-f]{16}/)', response.text))
    for name, asset in assets_of(server).items():
        assert asset.status_code == 200, name
        assert str(asset.request.url).endswith(f"/{folder}{name}")
        assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert asset.headers["content-type"].startswith(kind)
    assert server.http.get("/inspector/0123456789abcdef/inspector/main.js").status_code == 404
    assert server.http.get(f"/{folder}../page.py").status_code == 404


def test_every_module_and_style_sheet_is_served(server: RunningServer) -> None:
    assets = {name: asset.text for name, asset in assets_of(server).items()}
    html = server.http.get("/").text
    wanted = set(re.findall(r'"inspector/\w+/([\w./]+)"', html))
    for name, text in assets.items():
        folder = posixpath.dirname(name)
        wanted |= {posixpath.normpath(f"{folder}/{path}") for path in _IMPORT.findall(text)}
    assert {"inspector/main.js", "style.css"} <= wanted <= assets.keys()
    for name, text in {"index.html": html, **assets}.items():
        assert set(_ADDRESS.findall(text)) <= {_SVG.removeprefix("http:"), _SVG}, name


def test_without_the_inspector_an_index_of_endpoints_is_served(tiny_model: Path) -> None:
    settings = ServerSettings(
        model_names=(MODEL,), has_inspector=False, inspected_folder=tiny_model
    )
    app = create_app(AsyncEngine(loader(tiny_model)), settings, ServerMetrics(MODEL))

    index = get(app, "/")
    assert f"<h1>nanovllm {nanovllm.__version__}</h1>" in index.text
    document = get(app, "/openapi.json").json()["paths"]
    assert document
    assert not [path for path in document if path.startswith(("/v1/inspect", "/v1/engine"))]
    for path, operations in document.items():
        for method in operations:
            assert f"{method.upper()} {path}" in index.text
    assert 'href="docs"' in index.text
    for path in page.public_paths() - {"/"}:
        assert get(app, path).status_code == 404


def get(app: ASGIApp, path: str) -> httpx.Response:
    """GET from an application whose engine is not started."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(ask())
