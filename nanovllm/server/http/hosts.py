"""Which names a server answers to: a web page must not reach it under the page's own name.

A page may ask its own server anything, and the name of that server may lead to this machine the second time it is looked up (DNS
rebinding). The browser then sends the page's name as `Host`, and lets the page read the answer. So a server that anybody on this
machine may use without a key answers only where `Host` is a name that nobody else can own: an address, `localhost`, or what
`--allowed-hosts` says.
"""

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.server.http.errors import error_response, shorten

_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::[0-9]*)?")


class HostMiddleware:
    """Answers 403 where a request is for another host."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]) -> None:
        """Let requests pass to addresses, to localhost and to `allowed_hosts`, names in small letters without a port."""
        self._app = app
        self._allowed = frozenset(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 403."""
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            wrong = [host for host in hosts if not self._is_allowed(host)]
            if wrong:
                message = (
                    f"the request is for the host {shorten(repr(wrong[0]))}, to which this server does not answer; "
                    "start it with --allowed-hosts NAME, or with API keys"
                )
                await error_response(403, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = host_name(host)
        return (
            name in self._allowed
            or name == "localhost"
            or name.endswith(".localhost")
            or is_address(name)
        )


def host_name(host: str) -> str:
    """The name in a `Host` header: in small letters, without the port and the dot at the end; empty where it is none."""
    name = host.strip().lower()
    if is_address(name):  # of version 6, which has colons itself
        return name
    match = _HOST.fullmatch(name)
    if match is None:
        return ""
    address, plain = match.groups()
    if address is not None:
        return str(address) if is_address(address) else ""
    return str(plain).removesuffix(".")


def is_address(name: str) -> bool:
    """Whether it is an IP address, which no other machine can claim as its name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
