"""Access checks: the `Host` header (403) and API keys (401).

A web page may make its own name resolve to this machine on the second lookup (DNS rebinding). The
browser then sends the page's name as `Host` and lets the page read the response. A server without
keys on a loopback address therefore answers only to names that nobody else can own: IP addresses,
`localhost` and those of `--allowed-hosts`.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.http.clients import identify
from nanovllm.server.http.docs_page import PUBLIC_PATHS
from nanovllm.server.http.errors import error_response, shorten

OPEN_PATHS = PUBLIC_PATHS | {"/health", "/ping"}
"""Paths that need no API key."""
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::[0-9]*)?")


class ApiKeys:
    """The accepted API keys, which can be replaced while the server runs."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.replace(keys)

    def replace(self, keys: Iterable[str]) -> None:
        """Accept these keys and no others, from the next request on."""
        self._digests = [_digest(key.encode()) for key in keys]

    def accepts(self, digest: bytes) -> bool:
        """Return whether a digest is a key's, in a time that does not depend on the match."""
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class ApiKeyMiddleware:
    """Answer 401 without `Authorization: Bearer KEY`, except for `open_paths`."""

    def __init__(
        self, app: ASGIApp, api_keys: ApiKeys, open_paths: frozenset[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, which identifies the client from now on."""
        if scope["type"] == "http" and scope["path"] not in self._open_paths:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            digest = _digest(key.strip())
            if scheme.lower() != b"bearer" or not self._api_keys.accepts(digest):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                response = error_response(401, message, headers={"www-authenticate": "Bearer"})
                await response(scope, receive, send)
                return
            identify(scope, digest.hex())
        await self._app(scope, receive, send)


class TrustedHostMiddleware:
    """Answer 403 to requests whose `Host` header names another host.

    Unlike Starlette's class of this name, it allows every IP address and `*.localhost`.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        """Allow IP addresses, localhost and `allowed_hosts`, lowercase names without a port."""
        self._app = app
        self._allowed = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check every `Host` header."""
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            refused = [host for host in hosts if not self._is_allowed(host)]
            if refused:
                message = (
                    f"the request is for the host {shorten(repr(refused[0]))}, to which this "
                    "server does not answer; start it with --allowed-hosts NAME, or with API keys"
                )
                await error_response(403, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = host_name(host)
        is_local = name == "localhost" or name.endswith(".localhost")
        return name in self._allowed or is_local or is_address(name)


def host_name(host: str) -> str:
    """Return the lowercase name in a `Host` header, without port and final dot.

    Return an empty string for a malformed header.
    """
    name = host.strip().lower()
    if is_address(name):  # IPv6 addresses contain colons
        return name
    match = _HOST.fullmatch(name)
    if match is None:
        return ""
    address, plain = match.groups()
    if address is not None:
        return str(address) if is_address(address) else ""
    return str(plain).removesuffix(".")


def is_address(name: str) -> bool:
    """Return whether a name is an IP address, which DNS cannot rebind."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    """Return a key's SHA-256: comparing digests reveals no length."""
    return hashlib.sha256(key).digest()
