"""HTTP/1.1 edge cases: framings, half-closed connections, pipelining."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.server.http import protocol
from nanovllm.server.http.errors import ErrorAnswer
from tests.support.serving import RunningServer, loader, wait_until

LONG: dict[str, Any] = {"prompt": "the", "max_tokens": 110, "ignore_eos": True, "temperature": 0}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 5}


@pytest.fixture(scope="module")
def busy(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server whose answers take a second or two."""
    with RunningServer(loader(tiny_model, step_s=0.02), stalled_client_s=20.0) as running:
        yield running


def request(body: dict[str, Any], extra: str = "") -> bytes:
    """A completion as it is sent."""
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"{extra}Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def connect(server: RunningServer, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(content)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as received:
        return received.read()


def can_send(connection: socket.socket, content: bytes, times: int) -> bool:
    """Whether all of it is taken before the other side closes the connection."""
    try:
        for _ in range(times):
            connection.sendall(content)
    except OSError:
        return False
    return True


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_working(server: RunningServer) -> bool:
    return server.samples()["num_requests_running"] == 1


def unfinished(server: RunningServer) -> int:
    """Answers that are unfinished, without a connection to ask for them."""

    async def look() -> int:
        return server.engine.admission.stats().choices

    return server.on_loop(look)


def error_in(received: bytes) -> ErrorAnswer:
    found: ErrorAnswer = json.loads(received.partition(b"\r\n\r\n")[2])
    return found


def test_two_framings_of_one_body_are_refused_and_the_connection_closes(
    server: RunningServer,
) -> None:
    """RFC 9112, section 6.1: request smuggling by two framings."""
    smuggled = "GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    body = (
        "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n"
        f"\r\n0\r\n\r\n{smuggled}"
    )
    received = read_to_end(connect(server, body.encode()))
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert error_in(received)["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize("path", ["/v1/completions", "/nope"])
def test_a_body_in_chunks_of_single_bytes_ends_the_connection(
    server: RunningServer, path: str
) -> None:
    """Also where it was answered before: each chunk costs as much as one of 64 KiB."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with connect(server, head.encode()) as connection:
        assert not can_send(connection, b"1\r\na\r\n" * 10_000, 400)
    assert server.http.get("/health").status_code == 200


def test_a_body_in_small_chunks_is_read(server: RunningServer) -> None:
    content = (
        json.dumps({"prompt": "a", "max_tokens": 1, "user": "u" * 500}).encode().ljust(600_000)
    )
    parts = [content[at : at + 256] for at in range(0, 600_000, 256)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert read_to_end(connect(server, head + chunks + b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


def test_the_rest_of_an_answered_body_is_not_taken_without_end(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_REST_BYTES", 1 << 20)
    head = b"POST /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connect(server, head) as connection:
        assert not can_send(connection, chunk * 16, 50)


@pytest.mark.parametrize(
    "early", [b"\r\n", b"G", b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n", b" " * 200_000]
)
def test_bytes_that_come_early_do_not_hide_that_the_client_left(
    busy: RunningServer, early: bytes
) -> None:
    for extra in ("", "Connection: close\r\n"):
        before = busy.samples()["generation_tokens_total"]
        connection = connect(busy, request(LONG, extra))
        wait_until(lambda: unfinished(busy) == 1)
        connection.sendall(early)
        connection.close()
        wait_until(busy.is_idle)
        assert busy.samples()["generation_tokens_total"] < before + 110, "computed for nobody"


def test_early_bytes_do_not_spoil_the_answer(busy: RunningServer) -> None:
    """Responses are in order; data after `Connection: close` is dropped."""
    with busy.held():
        connection = connect(busy, request(SHORT))
        wait_until(lambda: unfinished(busy) == 1)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = read_to_end(connection)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.index(b"completion_tokens") < received.index(b'"version"')
    with busy.held():
        connection = connect(busy, request(SHORT, "Connection: close\r\n"))
        wait_until(lambda: unfinished(busy) == 1)
        connection.sendall(b"\r\nnoise")
    received = read_to_end(connection)
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert b"completion_tokens" in received


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_response(busy: RunningServer, *, stream: bool) -> None:
    connection = connect(busy, request({**LONG, "max_tokens": 20, "stream": stream}))
    connection.shutdown(socket.SHUT_WR)
    received = read_to_end(connection)
    assert b"HTTP/1.1 200 OK" in received
    if not stream:
        assert json.loads(received[received.index(b"{") :])["usage"]["completion_tokens"] == 20


def test_a_half_closed_client_that_leaves_is_detected(busy: RunningServer) -> None:
    before = busy.samples()["generation_tokens_total"]
    connection = connect(busy, request(LONG))
    wait_until(lambda: is_working(busy))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1000).startswith(b"HTTP/1.1 102 ")
    assert is_working(busy)
    connection.close()
    wait_until(busy.is_idle)
    assert busy.samples()["generation_tokens_total"] < before + 110, "it was computed for nobody"


def test_several_requests_before_a_half_is_closed_are_all_answered(server: RunningServer) -> None:
    connection = connect(server, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
    connection.shutdown(socket.SHUT_WR)
    assert read_to_end(connection).count(b"HTTP/1.1 200 OK") == 5


def test_at_the_limit_of_connections_the_one_idle_longest_is_closed(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model, step_s=0.001), max_connections=4) as running:
        with running.held():
            working = connect(running, request(SHORT))
            wait_until(lambda: unfinished(running) == 1)
            idle = [connect(running) for _ in range(20)]
            connection = connect(
                running, b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            )
            assert b'"version"' in read_to_end(connection)
            for one in idle[:15]:
                assert is_closed(one)
        working.shutdown(socket.SHUT_WR)
        assert b"completion_tokens" in read_to_end(working)
        for one in idle:
            one.close()


def test_where_no_connection_is_idle_a_new_one_is_refused(tiny_model: Path) -> None:
    with RunningServer(loader(tiny_model, step_s=0.001), max_connections=2) as running:
        with running.held():
            working = [connect(running, request(SHORT)) for _ in range(2)]
            wait_until(lambda: unfinished(running) == 2)
            received = read_to_end(connect(running, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert received.startswith(b"HTTP/1.1 503 ")
        assert error_in(received)["error"]["type"] == "ServiceUnavailableError"
        for one in working:
            one.shutdown(socket.SHUT_WR)
            assert b"completion_tokens" in read_to_end(one)
