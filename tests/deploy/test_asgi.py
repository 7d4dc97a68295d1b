"""Running an application without a socket."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from nanovllm.deploy.asgi import passed_on, respond

SCOPE = passed_on(
    {
        "type": "http",
        "method": "POST",
        "path": "/echo",
        "query_string": b"a=1",
        "headers": [(b"x-a", b"1")],
        "client": ("10.0.0.1", 5),
        "app": "cannot be sent to another process",
    }
)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    assert scope["query_string"] == b"a=1"
    assert scope["client"] == ("10.0.0.1", 5)
    assert "app" not in scope
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-b", b"2")]})
    for byte in message["body"]:
        await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def collect(app: Callable[..., Any], interval_s: float = 0) -> list[Message | bytes]:
    return [part async for part in respond(app, SCOPE, b"body", interval_s)]


def test_chunks_that_wait_are_joined() -> None:
    start = {"type": "http.response.start", "status": 201, "headers": [(b"x-b", b"2")]}
    assert run(collect(echo)) == [start, b"body"]


async def echo_slowly(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for byte in message["body"] * 50:
        await asyncio.sleep(0.001)
        await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})


def test_the_response_comes_in_its_chunks() -> None:
    _, *chunks = run(collect(echo_slowly))
    assert b"".join(chunks) == b"body" * 50
    assert len(chunks) > 10


def test_chunks_of_an_interval_are_joined_after_two_at_once() -> None:
    _, *chunks = run(collect(echo_slowly, interval_s=20))  # the end does not wait for it
    assert chunks[:2] == [b"b", b"o"]
    assert b"".join(chunks) == b"body" * 50
    assert len(chunks) <= 2 + 1


def test_more_chunks_than_may_wait_are_all_sent() -> None:
    async def many(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3000):
            await send({"type": "http.response.body", "body": b"x" * 10, "more_body": True})

    _, *chunks = run(collect(many, interval_s=0.01))
    assert b"".join(chunks) == b"x" * 30_000


def test_an_error_of_the_application_is_raised() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run(collect(fail))


def test_closing_the_response_is_a_disconnect() -> None:
    ended: list[str] = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        ended.append((await receive())["type"])

    async def read_one() -> None:
        parts = respond(endless, SCOPE, b"")
        assert isinstance(await anext(parts), dict)
        await parts.aclose()

    run(read_one())
    assert ended == ["http.disconnect"]


def test_an_application_that_ignores_the_disconnect_is_cancelled() -> None:
    cancelled: list[bool] = []

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def read_one() -> None:
        parts = respond(deaf, SCOPE, b"")
        await anext(parts)
        await parts.aclose()

    run(read_one())
    assert cancelled == [True]
