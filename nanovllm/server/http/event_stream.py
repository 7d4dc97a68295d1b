"""Responses that are sent piece by piece, and requests whose client may disconnect.

A client that closes its connection ends its request: whatever waits for it is cancelled. A slow
client gets larger pieces and delays nobody; protocol.py disconnects one that takes nothing. A
stream that has nothing to send, because its request is queued, sends nothing or, for proxies that
close idle connections, blank lines.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanovllm.server.http.errors import ClientDisconnectedError

T = TypeVar("T")
Write: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a call on a worker thread and returns its result."""

KEEP_ALIVE = b"\n\n"
"""Blank lines, which are no event. Load tools that strip each read, such as `vllm bench serve`,
would take a comment for the beginning of the next event."""
MAX_WRITE_BYTES = 1 << 18  # that are sent in one call
MAX_TURN_S = 0.005  # of the event loop, for pieces that follow each other without a wait


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, which is cancelled when the client closes its connection.

    Raises ClientDisconnectedError then.
    """
    task = asyncio.ensure_future(work)
    try:
        await _wait(task, request.receive)
        if task.cancelled():
            raise ClientDisconnectedError
        return task.result()
    finally:
        del task  # whose error's traceback has this frame


async def _wait(
    task: "asyncio.Future[Any]", receive: Receive, on_close: Callable[[], None] = lambda: None
) -> None:
    """Wait until a task is done, which is cancelled when the client closes its connection.

    `on_close` is called before that.
    """
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        on_close()
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PieceResponse(Response):
    """A response that sends pieces as they come; closes their source if the client disconnects.

    Attributes:
        on_close: called at the end in any case, even if no piece was taken.
    """

    media_type = "application/json"

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str] | None = None,
        on_close: Callable[[], None] = lambda: None,
        keep_alive_s: float | None = None,
    ) -> None:
        """Send `pieces` in order.

        Args:
            keep_alive_s: time without a piece after which blank lines are sent; None for never.
        """
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._pieces = pieces
        self.on_close = on_close
        self._keep_alive_s = keep_alive_s
        self._sending = asyncio.Lock()  # held while a piece or KEEP_ALIVE is sent
        self._sent_at_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the pieces end or the client disconnects."""
        writer = asyncio.ensure_future(self._write(send))
        await _wait(writer, receive, self.on_close)
        with suppress(OSError, asyncio.CancelledError):  # the client is gone
            writer.result()

    async def _write(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await self._send({"type": "http.response.start", **start}, send)
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            yielded_s = time.monotonic()
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    async with self._sending:
                        await self._write_piece(piece, send)
                    if time.monotonic() - yielded_s > MAX_TURN_S:  # many pieces are ready at once
                        await asyncio.sleep(0)
                        yielded_s = time.monotonic()
        finally:
            keep_alive.cancel()
            await asyncio.gather(keep_alive, return_exceptions=True)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False}, send)

    async def _write_piece(self, piece: bytes, send: Send) -> None:
        for start in range(0, len(piece), MAX_WRITE_BYTES):
            await self._send(_body_part(piece[start : start + MAX_WRITE_BYTES]), send)
            if len(piece) > MAX_WRITE_BYTES:  # sending megabytes takes long, too
                await asyncio.sleep(0)

    async def _send(self, message: Message, send: Send) -> None:
        """Send a message; return once the client has taken enough of the previous ones."""
        await send(message)
        self._sent_at_s = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send KEEP_ALIVE between pieces whenever nothing was sent for `keep_alive_s`."""
        limit_s = self._keep_alive_s
        while limit_s is not None:
            async with self._sending:
                idle_s = time.monotonic() - self._sent_at_s
                if idle_s >= limit_s:
                    await self._send(_body_part(KEEP_ALIVE), send)
                    idle_s = 0.0
            await asyncio.sleep(limit_s - idle_s)


def _body_part(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}


class EventStream(PieceResponse):
    """A stream of server-sent events."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_close: Callable[[], None] = lambda: None,
        keep_alive_s: float | None = None,
    ) -> None:
        """Send `events` in order; the arguments are those of PieceResponse."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, on_close=on_close, keep_alive_s=keep_alive_s)


def json_response(content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with JSON content; a large one is sent as the client takes it."""
    if len(content) <= MAX_WRITE_BYTES:
        return Response(content, media_type="application/json", headers=headers)

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield content

    return PieceResponse(pieces(), headers=headers)
