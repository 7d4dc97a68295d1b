"""Middleware of Ray Serve's proxy, which listens before the ingress.

The proxy itself answers two paths, without asking an application and thus without an API key:
`/-/healthz`, for probes, and `/-/routes`, which lists the applications. Only the first stays open.
Ray Serve takes the middleware from an environment variable of the processes that `ray start` and
`serve run` start:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=nanovllm.deploy.proxy:middlewares
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.http.errors import error_response

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_PREFIX = "/-/"
_OPEN_PATHS = frozenset({"/-/healthz"})


class ProxyPathsMiddleware:
    """Answer 404 to the proxy's own paths, except for the health check."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`, the proxy."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the path."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path.startswith(_PREFIX) and path not in _OPEN_PATHS:
                await error_response(404, "there is no such path")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middleware for Ray Serve, which calls this once in each proxy."""
    return [Middleware(ProxyPathsMiddleware)]
