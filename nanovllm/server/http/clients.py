"""Client: the sender of a request, who has a share of bounded room and stored responses."""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Scope


@dataclass(frozen=True, slots=True)
class Client:
    """The sender of a request.

    Attributes:
        name: the digest of its API key, or its address without a port: one machine is one client.
        key_digest: the digest of its API key; empty where the server has no keys.
    """

    name: str = ""
    key_digest: str = ""


def identify(scope: Scope, key_digest: str = "") -> None:
    """Record the sender of a request: its API key, else its address."""
    address = str(scope["client"][0]) if scope.get("client") else ""
    scope.setdefault("state", {})["client"] = Client(key_digest or address, key_digest)


def client_of(scope: Scope | Request) -> Client:
    """Return the recorded sender of a request; one without a name if there is none."""
    state = (scope.scope if isinstance(scope, Request) else scope).get("state", {})
    client: Client = state.get("client", Client())
    return client
