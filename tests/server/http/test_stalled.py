"""Stalled clients: what they hold is bounded, and their connections are closed."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from nanovllm.server.http.protocol import WatchedProtocol, watched_protocol
from nanovllm.server.openai import renderer
from nanovllm.server.openai.completions import ChoiceFormatter
from tests.support.serving import (
    RunningServer,
    join_choices,
    loader,
    read_events,
    run_threads,
    wait_until,
)

LIMIT_S = 0.5
SMALL_BUFFER_BYTES = 4096
EVENT_BYTES = 16384  # more than a step's news of four answers with 20 log-probabilities each
HEAVY: dict[str, Any] = {
    "prompt": "in the end",
    "n": 4,
    "max_tokens": 110,
    "ignore_eos": True,
    "logprobs": 20,
    "temperature": 0.5,
}


@pytest.fixture(scope="module")
def strict(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with a stall limit of half a second and small send buffers."""
    with RunningServer(
        loader(tiny_model, step_s=0.005), stalled_client_s=LIMIT_S, max_body_bytes=4096
    ) as running:
        running.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER_BYTES)
        yield running


def connect(server: RunningServer, content: bytes) -> socket.socket:
    """A connection on which this was sent, and that takes little without being read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(content)
    return connection


def request(body: dict[str, Any]) -> bytes:
    """A completion as it is sent."""
    content = json.dumps(body).encode()
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def read_to_end(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection, which may be a reset."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    connection.close()
    return b"".join(parts)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_holds_little_and_is_disconnected(
    strict: RunningServer, *, stream: bool
) -> None:
    alone = strict.complete("the", max_tokens=10, temperature=0)["choices"]
    connections = [connect(strict, request({**HEAVY, "stream": stream})) for _ in range(2)]
    most = 0

    def is_cut() -> bool:
        nonlocal most
        waiting = strict.unsent_bytes()
        most = max([most, *waiting.values()])
        return most > 0 and not any(waiting.values()) and strict.is_idle()

    complete: Callable[[], Any] = partial(strict.complete, "the", max_tokens=10, temperature=0)
    look: Callable[[], Any] = partial(wait_until, is_cut)
    *bodies, _ = run_threads([complete, complete, complete, complete, look])
    assert [body["choices"] for body in bodies] == [alone] * 4
    if stream:
        assert most <= (1 << 16) + EVENT_BYTES, "more was written for a client that does not read"
    for connection in connections:
        received = read_to_end(connection)
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_answer_is_written_beside_the_event_loop(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """Seconds of writing log-probabilities must not be seconds in which nobody else is answered."""
    whole, may_go_on, is_writing = ChoiceFormatter.choice, threading.Event(), threading.Event()
    body = {
        "prompt": [[1] * 50],
        "n": 3,
        "max_tokens": 2,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 2,
        "seed": 5,
        "stream": stream,
    }
    expected = strict.post(body).content

    def choice(self: ChoiceFormatter, *arguments: Any) -> Any:
        is_writing.set()
        assert may_go_on.wait(30)
        return whole(self, *arguments)

    monkeypatch.setattr(ChoiceFormatter, "choice", choice)
    monkeypatch.setattr(
        renderer, "MANY_POSITIONS", 40
    )  # the tiny model's context is not large enough
    received: list[bytes] = []
    asking = threading.Thread(
        target=lambda: received.append(
            httpx.post(f"{strict.url}/v1/completions", json=body, timeout=60).content
        )
    )
    asking.start()
    assert is_writing.wait(30)
    try:
        assert strict.http.get("/health").status_code == 200
    finally:
        may_go_on.set()
        asking.join()
    bodies = [
        read_events(content) if stream else [json.loads(content)]
        for content in (expected, received[0])
    ]
    answers = [join_choices(found) for found in bodies]
    assert answers[0] == answers[1]
    assert [answer.finish_reason for answer in answers[0].values()] == ["length"] * 3


def test_a_connection_on_which_nothing_comes_ends(strict: RunningServer) -> None:
    assert read_to_end(connect(strict, b"")) == b""


@pytest.mark.parametrize("sent", [b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(strict: RunningServer, sent: bytes) -> None:
    assert read_to_end(connect(strict, sent)).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_drips_ends_the_connection(strict: RunningServer) -> None:
    connection = connect(strict, b"GET /health HTTP/1.1\r\nx: ")
    connection.settimeout(0.05)
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            connection.sendall(b"a")
            assert connection.recv(12) == b"HTTP/1.1 408"
            break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("it was listened to for ever")
    connection.close()


def test_a_connection_may_be_used_again_after_longer_than_a_request_may_take(
    strict: RunningServer,
) -> None:
    """Its answers take longer than the limit, which is for the client's part."""
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=30)
    connection.connect()
    connection.auto_open = 0  # it must not be opened again in silence
    body = json.dumps({"prompt": "the", "max_tokens": 120, "ignore_eos": True})
    for _ in range(2):
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 120
    connection.close()


def test_a_body_that_drips_is_answered_with_408(strict: RunningServer) -> None:
    connection = connect(strict, request({"prompt": "a" * 3000})[:-2900])
    connection.settimeout(0.05)
    received = b""
    deadline_s = time.monotonic() + 30
    while b"}}" not in received and time.monotonic() < deadline_s:
        try:
            connection.sendall(b"a")
            received += connection.recv(1 << 16)
        except TimeoutError:
            continue
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"x-request-id" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["type"]) == (408, "RequestTimeoutError")
    assert f"{LIMIT_S:g} s" in error["message"]
    read_to_end(connection)
    wait_until(strict.is_idle)


class Watched:
    """A protocol on a transport and a clock of paper: what is decided when, to the second."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.buffered = 0
        self.ended: str | None = None
        self._calls: list[tuple[float, Callable[[], None]]] = []
        loop: Any = type(
            "Loop",
            (),
            {
                "time": lambda _: self.now_s,
                "call_later": lambda _, delay_s, call: self._call_later(delay_s, call),
            },
        )()

        async def app(scope: Any, receive: Any, send: Any) -> None: ...

        make = watched_protocol(8.0)
        self.protocol: WatchedProtocol = make(
            uvicorn.Config(app, log_config=None), ServerState(), {}, loop
        )
        self.protocol.connection_made(self)  # type: ignore[arg-type]

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> Any:
        entry = (self.now_s + delay_s, call)
        self._calls.append(entry)
        return type(
            "Handle",
            (),
            {"cancel": lambda _: self._calls.remove(entry) if entry in self._calls else None},
        )()

    def pass_time(self, seconds: float) -> None:
        """Go on, calling what is due."""
        end_s = self.now_s + seconds
        while due := [entry for entry in self._calls if entry[0] <= end_s]:
            entry = min(due, key=lambda one: one[0])
            self._calls.remove(entry)
            self.now_s = entry[0]
            entry[1]()
        self.now_s = end_s

    def write(self, data: bytes) -> None:
        """As a transport does whose client takes nothing."""
        self.buffered += len(data)

    def get_write_buffer_size(self) -> int:
        """What the client has not taken."""
        return self.buffered

    def get_extra_info(self, _: str) -> None:
        """Nothing is known of it."""

    def is_closing(self) -> bool:
        """Whether it ends."""
        return self.ended is not None

    def abort(self) -> None:
        """End at once."""
        self.ended = "aborted"

    def close(self) -> None:
        """End once all is taken."""
        self.ended = self.ended or "closed"


class UnderWay:
    """An answer that is not complete."""

    response_complete = False


def test_a_slow_reader_is_not_disconnected() -> None:
    watched = Watched()
    watched.protocol.cycle = UnderWay()  # type: ignore[assignment]
    for _ in range(50):
        watched.protocol.transport.write(b"a" * 100)  # more and more waits, but some is taken
        watched.pass_time(7.0)
        watched.buffered -= 1
    assert watched.ended is None
    watched.pass_time(7.9)
    assert watched.ended is None
    watched.pass_time(4.0)
    assert watched.ended == "aborted"


def test_a_client_may_wait_for_a_slow_response() -> None:
    watched = Watched()
    watched.protocol.cycle = UnderWay()  # type: ignore[assignment]
    watched.pass_time(1000)
    assert watched.ended is None


def test_after_a_polite_end_the_rest_must_be_taken_too() -> None:
    """The limit still applies to a closed asyncio transport until its last byte is read."""
    watched = Watched()
    watched.protocol.transport.write(b"the whole answer")
    watched.protocol.transport.close()
    watched.pass_time(7.9)
    assert watched.ended == "closed"
    watched.pass_time(4.0)
    assert watched.ended == "aborted"


def test_a_connection_that_ends_is_watched_no_longer() -> None:
    watched = Watched()
    watched.protocol.connection_lost(ConnectionResetError())
    watched.pass_time(1000)
    assert watched.ended is None
