"""Below the application: malformed, endless and unusual requests, sent as raw bytes."""

import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import RunningServer, loader

BODY = b'{"prompt": "a", "max_tokens": 1}'
CHUNKED = (
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client sends is a fault of the server."""
    yield
    assert [
        record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR
    ] == []


@pytest.fixture(scope="module")
def stalling(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that waits half a second for a head or a body, and takes small bodies only."""
    with RunningServer(
        loader(tiny_model, step_s=0.03), stalled_client_s=0.5, max_body_bytes=1000
    ) as running:
        yield running


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    """A request whose connection ends with it."""
    length = (f"Content-Length: {len(body)}", "Content-Type: application/json") if body else ()
    return (
        "\r\n".join([line, "Host: x", "Connection: close", *length, *headers, "", ""]).encode(
            "latin-1"
        )
        + body
    )


def exchange(server: RunningServer, *parts: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Send these bytes, read to the connection's end: (status, headers, body) of each answer."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
        connection.makefile("rb") as answer,
    ):
        for part in parts:
            connection.sendall(part)
        received = answer.read()
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        if "transfer-encoding" in headers:
            body, _, received = received.partition(b"0\r\n\r\n")
        else:
            length = int(headers.get("content-length", 0))
            body, received = received[:length], received[length:]
        answers.append((status, headers, body))
    return answers


def check_error(answer: tuple[int, dict[str, str], bytes], status: int) -> dict[str, Any]:
    """The error object of an answer, which has this status, the one form and a name."""
    assert answer[0] == status
    assert answer[1]["content-type"] == "application/json"
    assert answer[1]["x-request-id"]
    error: dict[str, Any] = json.loads(answer[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


NOT_HTTP: dict[str, bytes] = {
    "garbage": b"garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /version HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "two lengths": (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    ),
    "a length below 0": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -2\r\n\r\n{}",
    "another encoding of the body": (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    ),
    "a header without a colon": b"GET /version HTTP/1.1\r\nHost: x\r\nxyz\r\n\r\n",
    "NUL in a header": b"GET /version HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
    "a path that is not ASCII": "GET /é HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "a header without an end": b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000,
    "a chunk of an endless size": CHUNKED + b"F" * 30 + b"\r\n{}\r\n",
    "a chunk of no size": CHUNKED + b"2\r\n{}\r\nzz\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_malformed_http_gets_the_error_format_and_is_closed(
    server: RunningServer, name: str
) -> None:
    (answer,) = exchange(server, NOT_HTTP[name])
    error = check_error(answer, 400)
    assert error["type"] == "BadRequestError"
    assert answer[1]["connection"] == "close"


def test_garbage_after_a_request_is_answered_after_it(server: RunningServer) -> None:
    good = request("POST /v1/completions HTTP/1.1", body=BODY).replace(
        b"Connection: close\r\n", b""
    )
    first, second = exchange(server, good + b"garbage\r\n\r\n")
    assert first[0] == 200
    check_error(second, 400)


def test_garbage_in_the_body_after_its_answer_ends_the_connection(server: RunningServer) -> None:
    """The answer did not wait for the body, and there is nothing left to say."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
        connection.makefile("rb") as answer,
    ):
        connection.sendall(
            b"GET /version HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
        )
        assert answer.readline().startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"zz\r\n")
        assert b"HTTP/1.1" not in answer.read()


def test_a_connection_that_asks_nothing_is_closed(stalling: RunningServer) -> None:
    assert exchange(stalling, b"") == []


@pytest.mark.parametrize("part", [b"G", b"GET /version HTTP/1.1\r\nHost: x\r\nX: a"])
def test_a_head_that_does_not_come_is_not_waited_for(stalling: RunningServer, part: bytes) -> None:
    with (
        socket.create_connection(("127.0.0.1", stalling.port), timeout=20) as connection,
        connection.makefile("rb") as answer,
    ):
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.readline().startswith(b"HTTP/1.1 200 ")
        connection.sendall(part)
        rest = answer.read()
    assert rest.count(b"HTTP/1.1 ") == 1
    assert b"HTTP/1.1 408 Request Timeout\r\n" in rest
    assert b"did not arrive within 0.5 s" in rest


@pytest.mark.parametrize("part", [b"", b"5\r\n{    \r\n", b"5\r\n{ "])
def test_a_body_that_stops_coming_is_not_waited_for(stalling: RunningServer, part: bytes) -> None:
    (answer,) = exchange(stalling, CHUNKED + part)
    error = check_error(answer, 408)
    assert error["type"] == "RequestTimeoutError"
    assert "0.5 s" in error["message"]
    assert answer[1]["connection"] == "close"


def test_an_answer_may_take_longer_than_a_body(stalling: RunningServer) -> None:
    body = b'{"prompt": "a", "max_tokens": 20, "ignore_eos": true}'
    (answer,) = exchange(stalling, request("POST /v1/completions HTTP/1.1", body=body))
    assert json.loads(answer[2])["usage"]["completion_tokens"] == 20


def test_a_body_that_never_ends_is_answered_and_its_connection_closed(
    stalling: RunningServer,
) -> None:
    """The client goes on sending after the answer; it is given time to read that first."""
    is_closed = threading.Event()
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"

    def send_for_ever(connection: socket.socket) -> None:
        try:
            while True:
                connection.sendall(chunk)
        except OSError:
            is_closed.set()

    with socket.create_connection(("127.0.0.1", stalling.port), timeout=20) as connection:
        connection.sendall(CHUNKED)
        thread = threading.Thread(target=send_for_ever, args=(connection,))
        thread.start()
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert is_closed.wait(20)
        thread.join()


ODD: dict[str, tuple[bytes, int]] = {
    "HTTP/1.0": (b"GET /version HTTP/1.0\r\n\r\n", 200),
    "a body under HTTP/1.0": (request("POST /v1/completions HTTP/1.0", body=BODY), 200),
    "a header that is not ASCII": (request("GET /version HTTP/1.1", "X: \xff\xfe"), 200),
    "a host that is not one": (
        request("PUT /version HTTP/1.1").replace(b"Host: x", b"Host: [\xff"),
        405,
    ),
    "many headers": (request("GET /version HTTP/1.1", *["X: a"] * 3000), 200),
    "a slash at the end": (request("GET /version/ HTTP/1.1"), 200),
    "a slash at the end of a POST": (request("POST /v1/completions/ HTTP/1.1", body=BODY), 200),
    "two slashes at the end": (request("GET /version// HTTP/1.1"), 404),
    "only slashes": (request("GET // HTTP/1.1"), 404),
    "a slash at the end of a page": (request("GET /docs/ HTTP/1.1"), 404),
    "two slashes": (request("GET //version HTTP/1.1"), 404),
    "dots": (request("GET /%2e%2e/version HTTP/1.1"), 404),
    "NUL in the path": (request("GET /v1/models/%00 HTTP/1.1"), 404),
    "a slash in a model's name": (request("GET /v1/models/%2F HTTP/1.1"), 404),
    "no UTF-8 in the path": (request("GET /v1/models/%ff%fe HTTP/1.1"), 404),
    "half a pair in the path": (request("GET /v1/models/%ed%a0%80 HTTP/1.1"), 404),
    "a line break in the path": (request("GET /v1/models/%0d%0aX:y HTTP/1.1"), 404),
    "an escape that is none": (request("GET /v1/models/%zz HTTP/1.1"), 404),
    "no path": (request("OPTIONS * HTTP/1.1"), 404),
    "a proxy's request": (request("CONNECT x:80 HTTP/1.1"), 404),
    "a method in small letters": (request("get /version HTTP/1.1"), 405),
    "a method of its own": (request("FOO /version HTTP/1.1"), 405),
    "TRACE": (request("TRACE /version HTTP/1.1"), 405),
    "a websocket": (
        request("GET /version HTTP/1.1").replace(b"close", b"close, Upgrade\r\nUpgrade: websocket"),
        200,
    ),
    "the same field twice": (
        request(
            "POST /v1/completions HTTP/1.1", body=b'{"prompt": 5, "prompt": "a", "max_tokens": 1}'
        ),
        200,
    ),
    "a byte order mark": (
        request("POST /v1/completions HTTP/1.1", body=b"\xef\xbb\xbf" + BODY),
        200,
    ),
    "two content types": (
        request("POST /v1/completions HTTP/1.1", "Content-Type: text/plain", body=BODY),
        200,
    ),
    "a body to a GET": (request("GET /version HTTP/1.1", body=b"abc"), 200),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_gets_an_answer_as_any_other(server: RunningServer, name: str) -> None:
    sent, status = ODD[name]
    (answer,) = exchange(server, sent)
    assert answer[0] == status
    assert "location" not in answer[1]
    if status != 200:
        check_error(answer, status)


def test_requests_in_a_row_are_answered_in_a_row(server: RunningServer) -> None:
    post = request("POST /v1/completions HTTP/1.1", body=BODY).replace(
        b"Connection: close\r\n", b""
    )
    answers = exchange(server, post * 3 + request("GET /nope HTTP/1.1"))
    assert [status for status, _, _ in answers] == [200, 200, 200, 404]
