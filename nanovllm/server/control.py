"""The state that an operator changes while the server runs."""

from collections.abc import Iterable

from nanovllm.server.http.auth import ApiKeys


class ServerControl:
    """The API keys, and whether the server drains.

    Attributes:
        api_keys: the accepted keys; a server that started without keys checks none.
        is_draining: /health answers 503 although requests are served, because the server is about
            to stop and load balancers should send their requests elsewhere.
    """

    def __init__(self, api_keys: Iterable[str] = ()) -> None:
        self.api_keys = ApiKeys(api_keys)
        self.is_draining = False
