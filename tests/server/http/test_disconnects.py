"""Clients that disconnect at any moment: their requests end, and nothing is left behind."""

import asyncio
import gc
import json
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.engine.request_handle import RequestHandle
from nanovllm.server.openai.completions import ChoiceFormatter
from tests.support.async_engines import until
from tests.support.serving import (
    TIMEOUT_S,
    RunningServer,
    loader,
    read_events,
    run_threads,
    wait_until,
)

LONG: dict[str, Any] = {
    "prompt": "in the end",
    "max_tokens": 110,
    "ignore_eos": True,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def sluggish(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that takes seconds for a long output, runs two sequences and queues six."""
    with RunningServer(
        loader(tiny_model, step_s=0.03, max_num_seqs=2), max_queued_requests=6
    ) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with room for one request's output, which any leak would fill."""
    with RunningServer(loader(tiny_model, step_s=0.002), max_queued_requests=3) as running:
        yield running


def send_request(server: RunningServer, **body: Any) -> socket.socket:
    """A connection on which a completion has been asked for."""
    content = json.dumps({**LONG, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def close(connection: socket.socket, how: str) -> None:
    """Close a connection politely, with a reset, or only for sending."""
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how == "half":
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("stream", [False, True])
def test_closed_connections_abort_running_and_waiting_requests(
    sluggish: RunningServer, how: str, *, stream: bool
) -> None:
    before = sluggish.samples()["generation_tokens_total"]
    connections = [send_request(sluggish, stream=stream) for _ in range(6)]
    wait_until(
        lambda: (
            (now := sluggish.samples())["num_requests_running"] == 2
            and now["num_requests_waiting"] == 4
        )
    )
    wait_until(lambda: sluggish.samples()["generation_tokens_total"] > before + 3)
    assert sluggish.samples()["kv_cache_usage_perc"] > 0
    sluggish.error({"prompt": "the"}, 429)
    for connection in connections:
        close(connection, how)
    wait_until(sluggish.is_idle)
    assert sluggish.samples()["generation_tokens_total"] - before < 110, (
        "an answer was finished for nobody"
    )
    assert len(sluggish.complete("the", n=6, max_tokens=1)["choices"]) == 6


def test_a_stream_that_is_closed_in_the_middle_ends_its_request(sluggish: RunningServer) -> None:
    before = sluggish.samples()["generation_tokens_total"]
    with sluggish.http.stream(
        "POST", "/v1/completions", json={**LONG, "stream": True, "n": 3}
    ) as response:
        chunks = response.iter_raw()
        first = [next(chunks) for _ in range(2)]
    assert all(chunk.startswith(b"data: {") for chunk in first)
    wait_until(sluggish.is_idle)
    assert sluggish.samples()["generation_tokens_total"] - before < 3 * 110


def test_one_that_goes_does_not_disturb_one_that_stays(sluggish: RunningServer) -> None:
    body = {**LONG, "max_tokens": 20}
    alone = sluggish.complete(**body)["choices"]

    def stay() -> Any:
        return sluggish.complete(**body)["choices"]

    def go() -> Any:
        for _ in range(3):
            connection = send_request(sluggish, stream=True)
            time.sleep(0.2)
            connection.close()

    assert run_threads([stay, go])[0] == alone


class Client:
    """A client without a socket: what it does happens exactly when the test wants it."""

    def __init__(self, server: RunningServer, **body: Any) -> None:
        self._server = server
        self._body = json.dumps({**LONG, "prompt": ["in the end", "a", "the"], **body}).encode()
        self._sent_body = False
        self.gone = asyncio.Event()
        self.received: list[dict[str, Any]] = []
        self.on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None

    async def run(self) -> None:
        """Send the request and take its answer."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._body)).encode()),
        ]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "root_path": "", "headers": headers, "client": ("x", 1),
            "server": ("x", 2),
        }  # fmt: skip
        await self._server.app(scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if not self._sent_body:
            self._sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.received.append(message)
        if self.on_send is not None:
            await self.on_send(message)

    @property
    def content(self) -> bytes:
        """The answer's body so far."""
        return b"".join(message.get("body", b"") for message in self.received)


@pytest.fixture(autouse=True, scope="module")
def only_new_objects() -> None:
    """Hide objects of other tests, which nobody looks through again and again."""
    gc.collect()
    gc.freeze()


def live_handles() -> list[RequestHandle]:
    """Return the requests that something still holds."""
    gc.collect()
    return [
        found for found in gc.get_objects() if type(found) is RequestHandle
    ]  # isinstance would ask what a dead weak proxy stands for


def assert_nothing_is_left(server: RunningServer) -> None:
    wait_until(server.is_idle)
    wait_until(lambda: not live_handles())
    many = server.max_queued_requests
    assert len(server.complete("the", n=many, max_tokens=1)["choices"]) == many


MOMENTS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30, 50]


async def rest(moments: int) -> None:
    """Let the event loop run for a while; tokenizing on threads takes some time too."""
    for _ in range(moments):
        await asyncio.sleep(0.0005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_request_that_is_cancelled_at_any_moment_leaves_nothing(
    narrow: RunningServer, times: int, *, stream: bool
) -> None:
    async def run() -> None:
        for moments in MOMENTS:
            client = Client(narrow, stream=stream)
            task = asyncio.ensure_future(client.run())
            await rest(moments)
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(task, return_exceptions=True)

    narrow.on_loop(run)
    assert_nothing_is_left(narrow)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_request_that_is_cancelled_before_its_events_have_begun_leaves_nothing(
    narrow: RunningServer, times: int
) -> None:
    """The answer's head is not taken by anybody yet, and whoever cancels is in a hurry."""

    async def run() -> None:
        client = Client(narrow, stream=True)
        sending = asyncio.Event()

        async def never(_: Any) -> None:
            sending.set()
            await asyncio.Event().wait()

        client.on_send = never
        task = asyncio.ensure_future(client.run())
        await asyncio.wait_for(sending.wait(), TIMEOUT_S)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)

    narrow.on_loop(run)
    assert_nothing_is_left(narrow)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_at_any_moment_leaves_nothing(
    narrow: RunningServer, *, stream: bool
) -> None:
    async def run() -> None:
        for moments in MOMENTS:
            client = Client(narrow, stream=stream)
            task = asyncio.ensure_future(client.run())
            await rest(moments)
            client.gone.set()
            await asyncio.wait_for(task, TIMEOUT_S)

    narrow.on_loop(run)
    assert_nothing_is_left(narrow)


@pytest.mark.parametrize("message", [1, 2, 3, 10])
def test_a_connection_that_breaks_while_a_chunk_is_sent_leaves_nothing(
    narrow: RunningServer, message: int
) -> None:
    async def run() -> None:
        client = Client(narrow, stream=True)

        async def fail(_: Any) -> None:
            if len(client.received) >= message:
                raise OSError("broken pipe")

        client.on_send = fail
        await client.run()

    narrow.on_loop(run)
    assert_nothing_is_left(narrow)


def test_a_fault_in_the_middle_of_a_stream_is_an_event_before_the_end(
    narrow: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = ChoiceFormatter.choice, 0

    def choice(self: ChoiceFormatter, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise LookupError("the reason is for the log")
        return whole(self, *arguments)

    monkeypatch.setattr(ChoiceFormatter, "choice", choice)
    events = read_events(narrow.post({**LONG, "stream": True}).content)
    assert [event["choices"][0]["index"] for event in events[:-1]] == [0, 0]
    assert events[-1]["error"]["code"] == 500
    assert "for the log" not in events[-1]["error"]["message"]
    monkeypatch.undo()
    wait_until(narrow.is_idle)  # the log that pytest keeps still holds on to the request
    assert len(narrow.complete("the", n=3, max_tokens=1)["choices"]) == 3


def test_a_slow_reader_gets_larger_chunks_and_delays_no_other(slow_server: RunningServer) -> None:
    """Its output and those of others go on meanwhile; the text is the same in the end."""
    whole = slow_server.complete(**LONG)["choices"][0]["text"]

    async def run() -> Client:
        client = Client(slow_server, prompt=LONG["prompt"], stream=True)
        reading = asyncio.Event()

        async def wait(_: Any) -> None:
            if len(client.received) > 2:
                await reading.wait()

        client.on_send = wait
        task = asyncio.ensure_future(client.run())
        async with httpx.AsyncClient(base_url=slow_server.url, timeout=20) as http:
            others = [
                http.post("/v1/completions", json={**LONG, "max_tokens": 30}) for _ in range(4)
            ]
            assert all(response.status_code == 200 for response in await asyncio.gather(*others))
        await until(lambda: slow_server.engine.stats().num_requests_running == 0)
        assert not task.done()
        assert len(client.received) == 3, "more was sent to a client that does not read"
        reading.set()
        await asyncio.wait_for(task, TIMEOUT_S)
        return client

    client = slow_server.on_loop(run)
    events = read_events(client.content)
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    assert len(events) < 10


def test_a_client_that_waits_long_for_its_turn_is_not_taken_for_one_that_does_not_read(
    tiny_model: Path,
) -> None:
    with RunningServer(loader(tiny_model, step_s=0.4), stalled_client_s=0.1) as running:
        assert running.stream("the", max_tokens=3, ignore_eos=True)


def test_a_client_that_does_not_read_delays_no_other(slow_server: RunningServer) -> None:
    connections = [send_request(slow_server, stream=True, logprobs=20, n=4) for _ in range(3)]
    bodies = run_threads([partial(slow_server.complete, "the", max_tokens=10, temperature=0)] * 4)
    assert len({body["choices"][0]["text"] for body in bodies}) == 1
    for connection in connections:
        connection.close()
    wait_until(slow_server.is_idle)
