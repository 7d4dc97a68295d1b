"""Refuse requests that a web page of another origin sends to the inspector.

A browser sends simple requests across origins without asking. Their responses cannot be read
without CORS, but a POST could pause the server, and a GET could take the place of a watcher.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request

from nanovllm.server.http.errors import shorten


def check_origin(request: Request, allowed_origins: Sequence[str]) -> None:
    """Raise HTTPException 403 for a request of another origin's page.

    Args:
        allowed_origins: origins that may use the server, or `*` for all.
    """
    origin = request.headers.get("origin")
    if origin is None:  # browsers omit it in simple GETs
        origin = request.headers.get("sec-fetch-site", "none")
        is_foreign = origin not in ("none", "same-origin")
    else:
        is_allowed = "*" in allowed_origins or origin in allowed_origins
        is_foreign = not is_allowed and not _is_same_host(origin, request.headers.get("host", ""))
    if is_foreign:
        raise HTTPException(
            403,
            f"a page of another origin ({shorten(origin)}) sent this request; open the server's "
            "own page, or start the server with --allowed-origins",
        )


def _is_same_host(origin: str, host: str) -> bool:
    """Return whether an origin has the host and port of a Host header."""
    try:
        name = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    default_port = ":443" if origin.startswith("https:") else ":80"
    return bool(name) and name == host.lower().removesuffix(default_port)
