"""API keys, the limits of request bodies, and CORS: auth.py, body_limit.py and cors.py."""

import asyncio
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from nanovllm.engine.admission import RequestSize
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.scheduling.request import Request as Sequence
from nanovllm.server.http import auth
from nanovllm.server.http.body_limit import FREE_BODY_BYTES, BodyLimitMiddleware
from nanovllm.server.http.clients import Client
from nanovllm.server.service import ServerSettings
from tests.support.serving import MODEL, RunningServer, loader, read_error, wait_until

KEY = "secret key-1é"
KEYS = ("first", KEY, "the last, with a comma")
LIMIT = 50_000
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with keys, a small limit, and two web pages that may use it."""
    origins = (PAGE, "http://localhost:3000")
    with RunningServer(
        loader(tiny_model),
        api_keys=KEYS,
        max_body_bytes=LIMIT,
        allowed_origins=origins,
        chat_template=ChatTemplate("{{ messages[0].content }}", "the test's"),
    ) as running:
        yield running


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


WRONG_KEYS: dict[str, dict[bytes, bytes]] = {
    "none": {}, "empty": {b"authorization": b"Bearer"}, "another": bearer("secret"),
    "longer": bearer(KEY + "x"), "another case": bearer(KEY.upper()),
    "a part of one": bearer("the last"), "two at once": bearer("first,first"),
    "all": bearer(",".join(KEYS)), "no scheme": {b"authorization": KEY.encode()},
    "basic": bearer(KEY, "Basic"), "no UTF-8": {b"authorization": b"Bearer \xff"},
}  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/", "/metrics", "/version", "/docs/", "/nope"]
)
@pytest.mark.parametrize("name", WRONG_KEYS)
def test_without_the_key_everything_is_closed(guarded: RunningServer, name: str, path: str) -> None:
    response = guarded.http.get(path, headers=WRONG_KEYS[name])
    error = read_error(response, 401)
    assert read_error(guarded.http.options(path, headers=WRONG_KEYS[name]), 401) == error
    assert error["type"] == "AuthenticationError"
    assert "Authorization: Bearer" in error["message"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_health_is_open(guarded: RunningServer) -> None:
    for path in ("/health", "/health/", "/ping"):
        assert guarded.http.get(path).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_key_everything_is_open(guarded: RunningServer, scheme: str) -> None:
    for path in ("/v1/models", "/v1/models/", "/metrics", "/version", "/load"):
        assert guarded.http.get(path, headers=bearer(KEY, scheme)).status_code == 200
    for path in ("/v1/completions", "/v1/completions/"):
        response = guarded.http.post(
            path, json={"prompt": "a", "max_tokens": 1}, headers=bearer(KEY, scheme)
        )
        assert response.status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_each_of_several_keys_opens(guarded: RunningServer, key: str) -> None:
    assert guarded.http.get("/v1/models", headers=bearer(key)).status_code == 200
    assert (
        guarded.http.post("/tokenize", json={"prompt": "a"}, headers=bearer(key)).status_code == 200
    )
    read_error(guarded.http.post("/tokenize", json={"prompt": "a"}), 401)


def test_stored_responses_are_those_of_the_key(guarded: RunningServer) -> None:
    body = {"input": "a", "max_output_tokens": 1}
    created = guarded.http.post("/v1/responses", json=body, headers=bearer(KEY)).json()
    path, more = f"/v1/responses/{created['id']}", {**body, "previous_response_id": created["id"]}
    read_error(guarded.http.get(path), 401)
    for method in ("GET", "DELETE"):
        read_error(guarded.http.request(method, path, headers=bearer(KEYS[0])), 404)
    error = read_error(guarded.http.post("/v1/responses", json=more, headers=bearer(KEYS[0])), 400)
    assert error["param"] == "previous_response_id"
    assert guarded.http.get(path, headers=bearer(KEY)).json() == created


def test_every_request_is_compared_with_every_key(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopping at the key that matches would tell by the time it takes which one it was."""
    compared: list[tuple[int, int]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((len(given), len(known)))
        return given == known

    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=compare))
    for key in (*KEYS, "wrong", "f", "x" * 5000):
        compared.clear()
        guarded.http.get("/version", headers=bearer(key))
        assert len(compared) == len(KEYS)
        assert len({length for pair in compared for length in pair}) == 1, (
            "the time it takes depends on how long a key is"
        )


def test_a_key_that_fills_the_queue_leaves_room_to_another(guarded: RunningServer) -> None:
    digest = hashlib.sha256(KEYS[0].encode()).hexdigest()
    held = guarded.engine.admission.reserve(
        [RequestSize(guarded.max_queued_requests, 1)], client=digest
    )
    try:
        answers = [
            guarded.http.post("/v1/completions", json={"prompt": "a"}, headers=bearer(key))
            for key in KEYS[:2]
        ]
    finally:
        held.release()
    assert [answer.status_code for answer in answers] == [429, 200]
    assert answers[0].headers["retry-after"]


def test_settings_do_not_show_the_keys() -> None:
    assert KEY not in repr(ServerSettings(model_names=("m",), api_keys=KEYS))


def test_the_key_comes_before_the_body(guarded: RunningServer) -> None:
    """Without one, nothing is said about the body, whatever is wrong with it."""
    for wrong in (b'{"prompt": ""}', b"x", b"x" * (LIMIT + 1)):
        error = read_error(guarded.http.post("/v1/completions", content=wrong), 401)
        assert (error["type"], error["param"]) == ("AuthenticationError", None)
        assert "prompt" not in error["message"]
    error = read_error(
        guarded.http.post("/v1/completions", json={"prompt": ""}, headers=bearer(KEY)), 400
    )
    assert (error["type"], error["param"]) == ("BadRequestError", "prompt")


GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "a beam search": {"prompt": "a", "max_tokens": 2, "use_beam_search": True, "n": 2},
}


@pytest.mark.parametrize("name", GENERATING)
def test_the_engine_knows_whose_request_it_runs(
    guarded: RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every endpoint: the key's digest, the same for all requests of the key."""
    engine = guarded.engine.engine
    clients: list[str] = []
    add = engine.scheduler.add

    def note(request: Sequence) -> None:
        clients.append(request.client)
        add(request)

    monkeypatch.setattr(engine.scheduler, "add", note)
    path = name if name.startswith("/") else "/v1/completions"
    for key in (KEY, "first"):
        clients.clear()
        response = guarded.http.post(path, json=GENERATING[name], headers=bearer(key))
        assert response.status_code == 200, response.text
        assert set(clients) == {hashlib.sha256(key.encode()).hexdigest()}


def test_the_official_client_sends_the_key(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), api_keys=("ascii",)) as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="ascii", max_retries=0) as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
        with (
            OpenAI(base_url=f"{running.url}/v1", api_key="other", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)


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


def preflight(
    server: RunningServer, origin: str, path: str = "/v1/completions", method: str = "POST"
) -> httpx.Response:
    """What a browser asks before it lets a page send JSON with a key."""
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type",
    }
    return server.http.options(path, headers=headers)


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/completions", "POST"), ("/v1/models", "GET"), ("/v1/responses/x", "DELETE")],
)
def test_a_browser_may_ask_without_a_key(
    guarded: RunningServer, origin: str, path: str, method: str
) -> None:
    response = preflight(guarded, origin, path, method)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert method in response.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(
        response.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
    )
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin",
    [
        "https://other.example",
        "http://page.example",
        PAGE + ":8443",
        "null",
        PAGE + ".evil.example",
    ],
)
def test_other_pages_may_not(guarded: RunningServer, origin: str) -> None:
    response = preflight(guarded, origin)
    assert "origin" in read_error(response, 400)["message"]
    assert "access-control-allow-origin" not in response.headers
    answer = guarded.http.get("/version", headers={**bearer(KEY), b"origin": origin.encode()})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_preflight_for_another_method_is_refused(guarded: RunningServer) -> None:
    assert "method" in read_error(preflight(guarded, PAGE, method="PUT"), 400)["message"]


def test_pages_may_read_answers_errors_and_streams(
    guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {**bearer(KEY), b"origin": PAGE.encode()}

    def fail() -> bytes:
        raise RuntimeError("planted")

    monkeypatch.setattr(guarded.metrics, "render", fail)
    stream = {"prompt": "a", "max_tokens": 1, "stream": True}
    streamed = guarded.http.post("/v1/completions", json=stream, headers=headers)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    responses = {
        200: guarded.http.get("/version", headers=headers),
        400: guarded.http.post("/v1/completions", json={"prompt": ""}, headers=headers),
        401: guarded.http.get("/version", headers={"origin": PAGE}),
        404: guarded.http.get("/nope", headers=headers),
        413: guarded.http.post("/v1/completions", content=b" " * (LIMIT + 1), headers=headers),
        500: httpx.get(
            f"{guarded.url}/metrics", headers=headers
        ),  # on a connection of its own, which the server closes
    }
    for status, response in [*responses.items(), (200, streamed)]:
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        exposed = response.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-nanovllm-engine"} <= set(exposed)
        assert response.headers["x-request-id"]


def test_all_pages_may_where_all_are_allowed(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), allowed_origins=("*",)) as running:
        for response in (
            preflight(running, "null"),
            running.http.get("/version", headers={"origin": "https://any.example"}),
        ):
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


def test_no_page_may_where_none_is_named(server: RunningServer) -> None:
    response = preflight(server, PAGE)
    read_error(response, 405)
    answer = server.http.get("/version", headers={"origin": PAGE})
    for headers in (response.headers, answer.headers):
        assert not any(name.startswith("access-control") for name in headers)


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
