"""Count HTTP requests by method, status and route, as vLLM's prometheus-fastapi-instrumentator does."""

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.metrics import ServerMetrics

_NOT_COUNTED = frozenset(("/metrics", "/health", "/load", "/version"))
_CLIENT_DISCONNECTED = 499
_NO_ROUTE = "none"


class HttpMetricsMiddleware:
    """Counts each request when its answer has ended, also where another layer has refused it."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute], metrics: ServerMetrics) -> None:
        """Count what `app` answers; `routes` are those that it may come to."""
        self._app = app
        self._metrics = metrics
        known = [route for route in routes if isinstance(route, Route)]
        self._fixed_paths = {route.path for route in known if "{" not in route.path}
        self._patterns = [route for route in known if "{" in route.path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it."""
        handler = self._handler(scope) if scope["type"] == "http" else ""
        if scope["type"] != "http" or handler in _NOT_COUNTED:
            await self._app(scope, receive, send)
            return
        status = _CLIENT_DISCONNECTED
        is_counted = False

        def count() -> None:
            nonlocal is_counted
            if not is_counted:
                is_counted = True
                self._metrics.count_http_request(scope["method"], status, handler)

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                count()  # before the client can see the end of its answer
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            count()

    def _handler(self, scope: Scope) -> str:
        """Return the path of the route with the names of its parameters; never a client's text."""
        path: str = scope["path"]
        if path in self._fixed_paths:
            return path
        for route in self._patterns:
            if route.matches(scope)[0] is not Match.NONE:
                return route.path
        return _NO_ROUTE
