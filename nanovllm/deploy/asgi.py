"""Run an ASGI application (https://asgi.readthedocs.io/en/latest/specs/) without a socket."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message

Headers = Sequence[tuple[bytes, bytes]]
_MAX_CHUNKS = 64
"""Chunks of a response that wait to be taken; the application waits beyond that."""
_PROMPT_CHUNKS = 2
"""Chunks at the beginning that are never held back: the first of a chat has no text yet."""


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One HTTP request with its whole body.

    Attributes:
        path: decoded, and without the prefix of the application.
        query: the query string, without its question mark.
        client: address and port of the client, if known.
    """

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    client: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class ResponseStart:
    """Status and headers of a response; the chunks of its body follow."""

    status: int
    headers: Headers


class Lifespan:
    """Starts and stops an application by the ASGI lifespan protocol."""

    def __init__(self, app: ASGIApp) -> None:
        """Prepare to run `app`."""
        self._app = app
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the application; raises RuntimeError with its message if it cannot start."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        call = self._app(scope, self._received.get, self._sent.put)
        self._task = asyncio.ensure_future(call)
        await self._exchange("startup")

    async def stop(self) -> None:
        """Stop the application and wait for its end."""
        await self._exchange("shutdown")
        if self._task is not None:
            await self._task

    async def _exchange(self, phase: str) -> None:
        assert self._task is not None
        self._received.put_nowait({"type": f"lifespan.{phase}"})
        answer = asyncio.ensure_future(self._sent.get())
        await asyncio.wait({answer, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            await self._task  # raises what the application raised
        elif answer.result()["type"] != f"lifespan.{phase}.complete":
            raise RuntimeError(answer.result().get("message") or f"the {phase} failed")


async def respond(
    app: ASGIApp, request: HttpRequest, interval_s: float = 0.0
) -> AsyncGenerator[ResponseStart | bytes, None]:
    """Yield the start of the application's response, then the chunks of its body.

    Chunks that come within `interval_s` of the one before, after the beginning, are joined. Closing
    the generator tells the application that the client has disconnected.
    """
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]
    disconnected, hurry = asyncio.Event(), asyncio.Event()
    sent: asyncio.Queue[Message | None] = asyncio.Queue(_MAX_CHUNKS)

    async def receive() -> Message:
        if body:
            return body.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if sent.full():
            hurry.set()
        await sent.put(message)

    async def run() -> None:
        try:
            await app(_scope(request), receive, send)
        finally:
            hurry.set()
            if not disconnected.is_set():
                await sent.put(None)

    task = asyncio.ensure_future(run())
    chunks, due_s, loop = 0, 0.0, asyncio.get_running_loop()
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                yield ResponseStart(message["status"], tuple(message["headers"]))
            elif message["type"] == "http.response.body" and message.get("body"):
                chunks += 1
                if chunks > _PROMPT_CHUNKS and due_s > loop.time():
                    with suppress(asyncio.TimeoutError):  # until the end, or no room is left
                        await asyncio.wait_for(hurry.wait(), due_s - loop.time())
                due_s = loop.time() + interval_s
                if not task.done():
                    hurry.clear()
                yield _join(message["body"], sent)
        await task
    finally:
        disconnected.set()
        await _end(task, sent)


def _scope(request: HttpRequest) -> dict[str, Any]:
    """Return the connection scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": request.query,
        "headers": [(bytes(name), bytes(value)) for name, value in request.headers],
        "client": request.client,
        "server": None,
        "state": {},
    }


def _join(body: bytes, sent: "asyncio.Queue[Message | None]") -> bytes:
    """Return a chunk and those that wait after it."""
    bodies = [body]
    while not sent.empty():
        message = sent.get_nowait()
        if message is None:
            sent.put_nowait(None)  # the end is still to be seen
            break
        bodies.append(message.get("body", b""))
    return b"".join(bodies)


async def _end(task: "asyncio.Task[None]", sent: "asyncio.Queue[Message | None]") -> None:
    """Let the application notice the disconnect; cancel it if that takes over a second."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + 1.0
    while not task.done() and loop.time() < give_up:
        while not sent.empty():
            sent.get_nowait()
        await asyncio.wait({task}, timeout=0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
