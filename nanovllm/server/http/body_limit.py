"""Limits on request bodies: size (413), time (408), and memory over all requests (429).

Plain ASGI, so that nothing is buffered.
"""

import asyncio
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.http.clients import client_of
from nanovllm.server.http.errors import error_response
from nanovllm.shares import Shares

MAX_BODIES_BYTES = 128 << 20
"""Memory for the bodies of a client's requests, not counting the first FREE_BODY_BYTES of each.

It is less where the memory of the process is limited (`MemoryPlan.free_bytes`)."""
FREE_BODY_BYTES = 1 << 16
_RETRY_AFTER_S = 5


class BodyLimitMiddleware:
    """Refuse bodies that are too large or too slow.

    A declared length is checked at once, a chunked body while it arrives. A request holds its body
    until its response has ended; a body that would exceed `max_bodies_bytes` is refused. Bodies of
    up to FREE_BODY_BYTES are never refused for memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_body_s: float,
        max_bodies_bytes: int = MAX_BODIES_BYTES,
        free_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Accept bodies of up to `max_body_bytes` that are complete within `max_body_s`.

        `free_bytes` returns the memory for the bodies of all clients, once it is known. A client
        may always send one of `max_body_bytes`.
        """
        self._app = app
        self._max_bytes = max_body_bytes
        self._max_s = max_body_s
        self._turn = asyncio.Lock()
        self._held = Shares(max(max_bodies_bytes, max_body_bytes))
        self._free_bytes = free_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the declared length, then the body while the application reads it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = client_of(scope).name
        body = _LimitedBody(receive, asyncio.get_running_loop().time() + self._max_s)

        async def limited_receive() -> Message:
            message = await body.receive(self._max_s)
            self._check(body, client)
            if body.held_bytes:
                # One part of all large bodies in a turn of the event loop: the parts of a hundred
                # connections, read in each turn, would delay everybody else by seconds.
                async with self._turn:
                    await asyncio.sleep(0)
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"")
        try:
            if declared.isdigit() and int(declared[:20]) > self._max_bytes:
                raise self._too_large()
            await self._app(scope, limited_receive, send)
        except _BodyRefusedError as error:
            response = error_response(error.status, str(error), headers=error.headers)
            await response(scope, receive, send)
        finally:
            self._held.release(client, body.held_bytes)

    def _check(self, body: "_LimitedBody", client: str) -> None:
        """Check the size of a body so far and count its memory; raises _BodyRefusedError."""
        if body.num_bytes > self._max_bytes:
            raise self._too_large()
        free_bytes = self._free_bytes()
        if free_bytes is not None:
            self._held.fit(max(free_bytes, 2 * self._max_bytes))
        added_bytes = max(0, body.num_bytes - FREE_BODY_BYTES) - body.held_bytes
        if self._held.missing(client, added_bytes):
            message = (
                f"the bodies of unfinished requests have {self._held.total} bytes and "
                f"{added_bytes} more would pass {self._held.described(client)}; try again in "
                f"{_RETRY_AFTER_S} s"
            )
            raise _BodyRefusedError(429, message, {"retry-after": str(_RETRY_AFTER_S)})
        self._held.take(client, added_bytes)
        body.held_bytes += added_bytes

    def _too_large(self) -> "_BodyRefusedError":
        """Return the 413. The connection stays open, so that a client that still sends can read."""
        limit = f"the limit of {self._max_bytes} bytes"
        return _BodyRefusedError(
            413, f"the request's body is larger than {limit}; send less at once"
        )


class _LimitedBody:
    """One request's body while it arrives.

    Attributes:
        num_bytes: size so far.
        held_bytes: bytes of it that count against the limit over all requests.
    """

    def __init__(self, receive: Receive, deadline_s: float) -> None:
        """Read from `receive` until `deadline_s` on the event loop's clock."""
        self._receive = receive
        self._deadline_s = deadline_s
        self._is_complete = False
        self.num_bytes = 0
        self.held_bytes = 0

    async def receive(self, max_s: float) -> Message:
        """Return the next message; raises _BodyRefusedError after the deadline."""
        if self._is_complete:
            return await self._receive()  # waits for the client to disconnect
        remaining_s = self._deadline_s - asyncio.get_running_loop().time()
        # Until Python 3.12, asyncio.wait_for ignores a cancellation once its future is done.
        receiving = asyncio.ensure_future(self._receive())
        try:
            done, _ = await asyncio.wait({receiving}, timeout=remaining_s)
        finally:
            receiving.cancel()
        if not done:
            text = (
                f"the request's body was not complete after {max_s:g} s; "
                "send it faster, or less at once"
            )
            raise _BodyRefusedError(408, text, {"connection": "close"})
        message = receiving.result()
        self._is_complete = not message.get("more_body", False)
        self.num_bytes += len(message.get("body", b""))
        return message


class _BodyRefusedError(BaseException):
    """A refused body. No Exception: the application answers every Exception itself."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
