"""What is changed in the first line of a request: HEAD, and a slash at the end of the path."""

from starlette.types import ASGIApp, Receive, Scope, Send

_PAGES = frozenset({"/docs/"})  # the addresses in the page are relative to /docs


class HeadMiddleware:
    """Run HEAD, which load balancers and uptime checks send, as GET (RFC 9110, section 9.3.2).

    The routes know GET only. The server sends no body, because the request is still a HEAD to it. A
    route whose stream does not end by itself ends it where the scope has `is_head`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on as GET."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", "is_head": True}
        await self._app(scope, receive, send)


class TrailingSlashMiddleware:
    """Drop a slash at the end of a path, which some clients add to their base URL or to a path.

    A redirect would lose the body of a POST in some clients. It goes outside of all layers that
    look at the path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the shorter path."""
        path: str = scope.get("path", "/")
        if path.endswith("/") and path.strip("/") and path not in _PAGES:
            scope = {**scope, "path": path[:-1]}
        await self._app(scope, receive, send)
