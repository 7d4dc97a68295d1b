"""Run an ASGI application (https://asgi.readthedocs.io/en/latest/specs/) without a socket."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import ASGIApp, Message, Scope

_MAX_CHUNKS = 1024
"""Chunks of a response that wait to be taken; the application waits beyond that."""
_PROMPT_CHUNKS = 2
"""Chunks at the beginning that are never held back: the first of a chat has no text yet."""
_END_TIMEOUT_S = 1.0
_PASSED_ON = (
    "type", "http_version", "method", "scheme", "path", "query_string", "headers", "client",
)  # fmt: skip


def passed_on(scope: Scope) -> dict[str, Any]:
    """Return the parts of a request's scope that another process can use."""
    return {name: scope[name] for name in _PASSED_ON if name in scope}


async def respond(
    app: ASGIApp, scope: Scope, body: bytes, interval_s: float = 0.0
) -> AsyncGenerator[Message | bytes, None]:
    """Yield the message that starts the application's response, then the chunks of its body.

    After the first ones, chunks are at least `interval_s` apart; those that wait are joined.
    Closing the generator tells the application that the client has disconnected.

    Args:
        scope: the parts of the request's scope that `passed_on` returns.
        body: the whole body of the request.
    """
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    disconnected = asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue(_MAX_CHUNKS)

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message | None) -> None:
        if not disconnected.is_set():
            await sent.put(message)

    async def run() -> None:
        own = {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "", "state": {}}
        try:
            await app({"server": None, **scope, **own}, receive, send)
        finally:
            await send(None)

    task = asyncio.ensure_future(run())
    num_chunks = 0
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield message
            elif chunk := _join(message, sent):
                yield chunk
                num_chunks += 1
                if num_chunks >= _PROMPT_CHUNKS and interval_s:
                    await asyncio.wait({task}, timeout=interval_s)
        await task
    finally:
        disconnected.set()
        while not sent.empty():  # so that `send` does not wait for room
            sent.get_nowait()
        await asyncio.wait({task}, timeout=_END_TIMEOUT_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _join(message: Message, sent: "asyncio.Queue[Message | None]") -> bytes:
    """Return the chunk of a message and those that wait after it."""
    bodies = [message.get("body", b"")]
    while not sent.empty():
        following = sent.get_nowait()
        if following is None:
            sent.put_nowait(None)  # the end is still to be seen
            break
        bodies.append(following.get("body", b""))
    return b"".join(bodies)
