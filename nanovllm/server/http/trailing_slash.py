"""A slash at the end of a path, which some clients add to their base URL or to a path.

A redirect would lose the body of a POST in some clients, so the path is changed instead.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

_PAGES = frozenset({"/docs/"})  # the addresses in the page are relative to /docs


class TrailingSlashMiddleware:
    """Drop one slash at the end of a path, before anything looks at it."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`, whose paths end without a slash."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the shorter path."""
        path: str = scope.get("path", "/")
        if path.endswith("/") and path.strip("/") and path not in _PAGES:
            scope = {**scope, "path": path[:-1]}
        await self._app(scope, receive, send)
