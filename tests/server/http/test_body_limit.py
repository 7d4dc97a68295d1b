"""Limits of request bodies: one body, all bodies together, and the memory of the process."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from nanovllm.server.http.body_limit import FREE_BODY_BYTES, BodyLimitMiddleware
from nanovllm.server.http.clients import Client
from tests.support.guarded import KEY, LIMIT, bearer
from tests.support.serving import RunningServer, read_error, wait_until


def pieces(size: int) -> Iterator[bytes]:
    """A body of a size that is not declared."""
    for _ in range(size // 10_000):
        yield b" " * 10_000


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [LIMIT + 10_000, 100 * LIMIT])
def test_a_body_over_the_limit_is_refused(
    guarded: RunningServer, size: int, *, chunked: bool
) -> None:
    """Also where it is so large that the client is still sending when the answer comes."""
    for _ in range(3):
        content = pieces(size) if chunked else b" " * size
        response = guarded.http.post(
            "/v1/completions",
            content=content,
            headers={b"content-type": b"application/json", **bearer(KEY)},
        )
        error = read_error(response, 413)
        assert error["type"] == "RequestTooLargeError"
        assert str(LIMIT) in error["message"]
    assert guarded.http.get("/health").status_code == 200


def test_after_a_body_over_the_limit_the_connection_is_still_good(guarded: RunningServer) -> None:
    """Closing it while the client sends would reset it, and the answer could be lost on the way."""
    size = 100 * LIMIT
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {size}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(
            head + b" " * size + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        )
        with connection.makefile("rb") as answer:
            received = answer.read()
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in received


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_at_the_limit_is_read(guarded: RunningServer, *, chunked: bool) -> None:
    content = b'{"prompt": "a"}'.ljust(LIMIT)
    whole = iter([content]) if chunked else content
    response = guarded.http.post(
        "/v1/completions",
        content=whole,
        headers={b"content-type": b"application/json", **bearer(KEY)},
    )
    assert response.status_code == 200


@pytest.mark.parametrize("length", [b"99999999999999999999999999", b"100000000000"])
def test_a_declared_length_is_enough_to_refuse(guarded: RunningServer, length: bytes) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\nContent-Length: "
            + length
            + b"\r\n\r\n"
        )
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_a_client_that_leaves_before_its_body_is_complete_leaves_nothing_behind(
    guarded: RunningServer,
) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
            head = (
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer " + KEY.encode()
            )
            connection.sendall(head + b'\r\nContent-Length: 100\r\n\r\n{"prompt": ')
    with httpx.Client(base_url=guarded.url, headers=bearer(KEY)) as client:
        wait_until(lambda: client.get("/metrics").status_code == 200)
        assert (
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        )


BODY_BYTES = 100_000


def test_bodies_that_are_held_are_bounded_together() -> None:
    """Any number of connections may each have sent almost all of a large body."""
    asyncio.run(hold_bodies())


def test_bodies_fit_the_memory_of_the_process() -> None:
    """In a small container, one client's bodies would otherwise end the server."""
    free_bytes: list[int | None] = [None]
    size = 1 << 20

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0.1)
        await PlainTextResponse("read")(scope, receive, send)

    async def statuses() -> list[int]:
        guard = BodyLimitMiddleware(app, size, 60.0, free_bytes=lambda: free_bytes[0])
        received: list[int] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b" " * size, "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                received.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await asyncio.gather(*(guard(scope, receive, send) for _ in range(3)))
        return sorted(received)

    assert asyncio.run(statuses()) == [200, 200, 200]
    free_bytes[0] = 0
    assert asyncio.run(statuses()) == [200, 429, 429]
    free_bytes[0] = 8 * size
    assert asyncio.run(statuses()) == [200, 200, 200]


async def hold_bodies() -> None:
    may_end = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await may_end.wait()
        await PlainTextResponse("read")(scope, receive, send)

    counted = BODY_BYTES - FREE_BODY_BYTES
    guard = BodyLimitMiddleware(app, BODY_BYTES, 60.0, max_bodies_bytes=3 * counted)

    async def post(num_bytes: int, client: str = "a") -> int:
        parts = [b" " * 10_000] * (num_bytes // 10_000)
        statuses: list[int] = []

        async def receive() -> Message:
            await asyncio.sleep(0)
            part = parts.pop() if parts else b""
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        state = {"client": Client(client)}
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": state}
        await guard(scope, receive, send)
        return statuses[0]

    for _ in range(2):  # what was held is given back
        may_end.clear()
        held = [asyncio.ensure_future(post(BODY_BYTES)) for _ in range(3)]
        for _ in range(50):
            await asyncio.sleep(0)
        assert await post(BODY_BYTES) == 429
        newcomer = asyncio.ensure_future(post(BODY_BYTES // 5 * 4, "b"))
        small = asyncio.ensure_future(post(10_000))
        for _ in range(10):
            await asyncio.sleep(0)
        may_end.set()
        assert await asyncio.gather(*held, small, newcomer) == [200] * 5


def test_large_bodies_share_the_turns_of_the_event_loop() -> None:
    """A turn reads a part of one of them, however many there are."""
    num_turns, num_parts = 0, 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await PlainTextResponse("read")(scope, receive, send)

    guard = BodyLimitMiddleware(app, 1 << 24, 60.0)

    async def post() -> None:
        left = 10

        async def receive() -> Message:
            nonlocal left, num_parts
            left -= 1
            num_parts += 1
            return {"type": "http.request", "body": b" " * FREE_BODY_BYTES, "more_body": left > 0}

        async def send(message: Message) -> None:
            pass

        await guard({"type": "http", "headers": []}, receive, send)

    async def run() -> None:
        nonlocal num_turns
        bodies = asyncio.gather(*(post() for _ in range(20)))
        while not bodies.done():
            await asyncio.sleep(0)
            num_turns += 1

    asyncio.run(run())
    assert num_parts == 200
    assert num_turns >= 180, "but for the first part of each"
