"""Which paths of Ray Serve's proxy are open."""

import asyncio
from typing import Any

import httpx
import pytest
from starlette.middleware import Middleware
from starlette.responses import Response

from nanovllm.deploy.proxy import middlewares


@pytest.mark.parametrize(
    ("path", "status"),
    [("/-/routes", 404), ("/-/", 404), ("/-/healthz", 200), ("/v1/models", 200), ("/-x", 200)],
)
@pytest.mark.parametrize("root", ["", "/books"])
def test_the_routes_of_the_proxy_are_closed(path: str, status: int, root: str) -> None:
    (middleware,) = middlewares()
    assert isinstance(middleware, Middleware)
    app: Any = middleware.cls(Response("of the proxy"), *middleware.args, **middleware.kwargs)

    async def ask() -> int:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.get(root + path)).status_code

    assert asyncio.run(ask()) == status
