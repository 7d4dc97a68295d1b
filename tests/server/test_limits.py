"""The key, and how large a request may be: both are checked before a body is read."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.support.serving import MODEL, RunningServer, loader, read_error, wait_until

KEY = "secret key-1é"
LIMIT = 50_000


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with a key and a small limit."""
    with RunningServer(loader(tiny_model), api_key=KEY, max_body_bytes=LIMIT) as running:
        yield running


def bearer(key: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"authorization": f"{scheme} {key}".encode()}


WRONG_KEYS: dict[str, dict[bytes, bytes]] = {
    "none": {}, "empty": {b"authorization": b"Bearer"}, "another": bearer("secret"), "longer": bearer(KEY + "x"), "another case": bearer(KEY.upper()),
    "no scheme": {b"authorization": KEY.encode()}, "basic": bearer(KEY, "Basic"), "no UTF-8": {b"authorization": b"Bearer \xff"},
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/docs", "/nope"])
@pytest.mark.parametrize("name", WRONG_KEYS)
def test_without_the_key_everything_is_closed(guarded: RunningServer, name: str, path: str) -> None:
    response = guarded.http.get(path, headers=WRONG_KEYS[name])
    error = read_error(response, 401)
    assert error["type"] == "AuthenticationError"
    assert "Authorization: Bearer" in error["message"]
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_health_is_open(guarded: RunningServer) -> None:
    assert guarded.http.get("/health").status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_key_everything_is_open(guarded: RunningServer, scheme: str) -> None:
    for path in ("/v1/models", "/metrics", "/version"):
        assert guarded.http.get(path, headers=bearer(KEY, scheme)).status_code == 200
    response = guarded.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=bearer(KEY, scheme))
    assert response.status_code == 200


def test_the_key_comes_before_the_body(guarded: RunningServer) -> None:
    read_error(guarded.http.post("/v1/completions", json={"prompt": ""}), 401)
    read_error(guarded.http.post("/v1/completions", content=b"x" * (LIMIT + 1)), 401)
    read_error(guarded.http.post("/v1/completions", json={"prompt": ""}, headers=bearer(KEY)), 400)


def test_the_official_client_sends_the_key(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model), api_key="ascii") as running:
        with OpenAI(base_url=f"{running.url}/v1", api_key="ascii", max_retries=0) as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
        with OpenAI(base_url=f"{running.url}/v1", api_key="other", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model=MODEL, prompt="a", max_tokens=1)


def pieces(size: int) -> Iterator[bytes]:
    """A body of a size that is not declared."""
    for _ in range(size // 10_000):
        yield b" " * 10_000


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [LIMIT + 10_000, 100 * LIMIT])
def test_a_body_over_the_limit_is_refused(guarded: RunningServer, size: int, *, chunked: bool) -> None:
    """Also where it is so large that the client is still sending when the answer comes."""
    for _ in range(3):
        content = pieces(size) if chunked else b" " * size
        response = guarded.http.post("/v1/completions", content=content, headers={b"content-type": b"application/json", **bearer(KEY)})
        error = read_error(response, 413)
        assert error["type"] == "RequestTooLargeError"
        assert str(LIMIT) in error["message"]
    assert guarded.http.get("/health").status_code == 200


def test_after_a_body_over_the_limit_the_connection_is_still_good(guarded: RunningServer) -> None:
    """Closing it while the client sends would reset it, and the answer could be lost on the way."""
    size = 100 * LIMIT
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {size}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        connection.sendall(head + b" " * size + b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with connection.makefile("rb") as answer:
            received = answer.read()
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in received


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_at_the_limit_is_read(guarded: RunningServer, *, chunked: bool) -> None:
    content = b'{"prompt": "a"}'.ljust(LIMIT)
    whole = iter([content]) if chunked else content
    response = guarded.http.post("/v1/completions", content=whole, headers={b"content-type": b"application/json", **bearer(KEY)})
    assert response.status_code == 200


@pytest.mark.parametrize("length", [b"99999999999999999999999999", b"100000000000"])
def test_a_declared_length_is_enough_to_refuse(guarded: RunningServer, length: bytes) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\nContent-Length: " + length + b"\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_a_client_that_leaves_before_its_body_is_complete_leaves_nothing_behind(guarded: RunningServer) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", guarded.port), timeout=10) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer " + KEY.encode()
            connection.sendall(head + b'\r\nContent-Length: 100\r\n\r\n{"prompt": ')
    with httpx.Client(base_url=guarded.url, headers=bearer(KEY)) as client:
        wait_until(lambda: client.get("/metrics").status_code == 200)
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
