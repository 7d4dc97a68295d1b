"""Refuse requests to the inspector that a web page of another origin sends.

Such a page cannot read a response without CORS, but it could start work, for example by
`<img src="http://localhost:8000/v1/inspect/embeddings">`. Browsers send Origin with every POST, and
Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/) with every request to a trustworthy origin,
which includes localhost.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.http.errors import error_response

_PATHS = ("/v1/engine/", "/v1/inspect/")
_FOREIGN_SITES = frozenset({"cross-site", "same-site"})
_MESSAGE = (
    "a web page of another origin may not use the inspector; start the server with "
    "--allowed-origins ORIGIN to allow it"
)


class SameOriginMiddleware:
    """Answer 403 to pages of other origins than the allowed ones, for paths of the inspector."""

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str] = ()) -> None:
        """Allow the origins of --allowed-origins; `*` allows all."""
        self._app = app
        self._allowed = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the headers of a request."""
        is_checked = scope["type"] == "http" and scope["path"].startswith(_PATHS)
        is_refused = is_checked and not self._is_allowed(Headers(scope=scope))
        answer = error_response(403, _MESSAGE) if is_refused else self._app
        await answer(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if "*" in self._allowed or origin in self._allowed:
            return True
        if origin is not None:
            return _host_of(origin) == headers.get("host", "").lower()
        return headers.get("sec-fetch-site") not in _FOREIGN_SITES


def _host_of(origin: str) -> str | None:
    """Return the host and port of an origin; None for `null` and for a malformed one."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
