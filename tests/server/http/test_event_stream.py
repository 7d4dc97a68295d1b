"""PieceResponse: blank lines between events, and clients that take nothing."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from nanovllm.server.http import event_stream
from nanovllm.server.http.event_stream import KEEP_ALIVE, PieceResponse
from tests.support.load_tools import READERS


def collect(pieces: list[bytes], keep_alive_s: float | None) -> bytes:
    """Return what a response sends whose pieces come when other tasks have had their turn."""
    sent: list[bytes] = []

    async def make() -> AsyncGenerator[bytes, None]:
        for piece in pieces:
            for _ in range(5):
                await asyncio.sleep(0)
            yield piece

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        sent.append(message.get("body", b""))

    response = PieceResponse(make(), keep_alive_s=keep_alive_s)
    asyncio.run(response({"type": "http"}, receive, send))
    return b"".join(sent)


def test_blank_lines_stand_between_events_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_WRITE_BYTES", 4)
    events = [f"data: {number:020}\n\n".encode() for number in range(20)]
    kept = collect(events, keep_alive_s=0.0)
    parts = kept.split(b"\n\n")
    assert [part for part in parts if part] == [event.strip() for event in events]
    assert kept.count(KEEP_ALIVE * 2) >= len(events)
    for keep_alive_s in (100.0, None):
        assert collect(events, keep_alive_s) == b"".join(events)


@pytest.mark.parametrize("count", range(1, 6))
def test_load_tools_lose_nothing_for_blank_lines(count: int) -> None:
    """`count` pieces of a stream arrive in one read."""
    events = [f'data: {{"choices": [{{"text": "{number} "}}]}}\n\n' for number in range(5)]
    events.append("data: [DONE]\n\n")
    pieces = [piece for event in events for piece in (KEEP_ALIVE, event.encode(), KEEP_ALIVE)]
    reads = [b"".join(pieces[at : at + count]) for at in range(0, len(pieces), count)]
    for read in READERS:
        assert read(reads) == "0 1 2 3 4 "


def test_a_client_that_goes_while_it_takes_nothing_ends_the_source() -> None:
    ends: list[str] = []

    async def make() -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.Future()
            yield b""
        finally:
            ends.append("source")

    async def test() -> None:
        taking = asyncio.Event()

        async def receive() -> Message:
            await taking.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                taking.set()
                await asyncio.Future()

        response = PieceResponse(
            make(), on_close=lambda: ends.append("requests"), keep_alive_s=0.01
        )
        await asyncio.wait_for(response({"type": "http"}, receive, send), 30)

    asyncio.run(test())
    assert ends == ["requests", "source"]


def test_pieces_that_are_ready_at_once_let_other_tasks_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt has an event, and a thousand of them may be ready after one step."""
    monkeypatch.setattr(event_stream, "MAX_TURN_S", -1.0)
    num_sent, num_seen = 0, list[int]()

    async def make() -> AsyncGenerator[bytes, None]:
        for _ in range(20):
            yield b"data: 1\n\n"

    async def receive() -> Message:
        while num_sent < 20:
            num_seen.append(num_sent)
            await asyncio.sleep(0)
        return await asyncio.Future()

    async def send(message: Message) -> None:
        nonlocal num_sent
        num_sent += 1

    asyncio.run(PieceResponse(make())({"type": "http"}, receive, send))
    assert len(set(num_seen)) > 10
