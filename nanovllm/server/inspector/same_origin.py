"""Refuse requests that a web page of another origin sends.

Such a page cannot read a response without CORS, but it could start work, for example by
`<img src="http://localhost:8000/v1/inspect/embeddings">`. Browsers send Origin with every POST, and
Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/) with every request to a trustworthy origin,
which includes localhost.
"""

from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request

_FOREIGN_SITES = frozenset({"cross-site", "same-site"})


def same_origin_check(
    allowed_origins: Sequence[str] = (),
) -> Callable[[Request], Awaitable[None]]:
    """Return a dependency that answers 403 to pages of other origins than the allowed ones.

    `allowed_origins` are those of --allowed-origins; `*` allows all.
    """

    async def check_same_origin(request: Request) -> None:
        origin = request.headers.get("origin")
        if "*" in allowed_origins or origin in allowed_origins:
            return
        is_foreign = request.headers.get("sec-fetch-site") in _FOREIGN_SITES
        if origin is not None:
            is_foreign = _host_of(origin) != request.headers.get("host", "").lower()
        if is_foreign:
            raise HTTPException(
                403,
                "a web page of another origin may not use the inspector; start the server with "
                "--allowed-origins ORIGIN to allow it",
            )

    return check_same_origin


def _host_of(origin: str) -> str | None:
    """Return the host and port of an origin; None for `null` and for a malformed one."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
