"""Well-behaved clients of a server under attack: their waits and their responses.

Each keeps one connection open, as client libraries do. An unfinished wait counts with its duration
so far. `own_delay_s` is the longest time without a processor of this process: waits that are not
longer say nothing about the server.

Run: python -m tests.load.bystanders --port 8000 --pid 123

As a program they run until standard input ends; the last line of output is JSON.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cli.argument_types import positive
from tests.load.ledger import WrongAnswerError, essence, must_be_whole, read_events
from tests.load.requests import COMPLETIONS, Ask
from tests.load.watch import tree_bytes
from tests.load.wire import Answer, Connection, get, parse, post

OK, REFUSED, LOST, OTHER_BITS = "ok", "refused", "lost", "other bits"
BEGUN = "begun"
"""The first line of output: from here on they are watching."""
HEALTH_INTERVAL_S = 0.01
_COMPLETION_INTERVAL_S = 0.02
_KNOWN_INTERVAL_S = 0.3
_RETRY_INTERVAL_S = 0.05
_MEMORY_INTERVAL_S = 0.25
_PROMPT = "Once upon a time there was a king"
_PROMPT_IDS = [100, 200, 300, 400, 500]


@dataclass(slots=True)
class Stopwatch:
    """The longest wait between two events, including the current one."""

    longest_s: float = 0.0
    _since_s: float | None = None

    def start(self) -> None:
        """Start a wait."""
        self._since_s = time.monotonic()

    def lap(self) -> None:
        """End the wait and start the next."""
        self.longest_s = self.read()
        self.start()

    def stop(self) -> None:
        """End the wait."""
        self.longest_s = self.read()
        self._since_s = None

    def read(self) -> float:
        """Return the longest wait so far."""
        if self._since_s is None:
            return self.longest_s
        return max(self.longest_s, time.monotonic() - self._since_s)


class Session:
    """A connection for all requests, reopened after the server closed it."""

    def __init__(self, port: int) -> None:
        """Connect with the first request."""
        self._port = port
        self._connection: Connection | None = None

    async def ask(self, request: bytes, watch: Stopwatch, gaps: Stopwatch | None = None) -> Answer:
        """Send a request and return its response.

        Args:
            watch: measures the response, or with `gaps` the time to the first event.
            gaps: measures the time between events.

        Raises:
            OSError: no connection, or a broken one.
            WrongAnswerError: the connection ended before the response did.
        """
        watch.start()
        reused = self._connection is not None
        try:
            answer = await self._ask(request, watch, gaps)
            if answer is None and reused:  # closed meanwhile for being idle
                answer = await self._ask(request, watch, gaps)
        except BaseException:
            await self.aclose()
            raise
        finally:
            if gaps is not None:
                gaps.stop()
        if answer is None:
            raise WrongAnswerError("the connection ended without an answer")
        watch.stop()
        return answer

    async def aclose(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.__aexit__()
            self._connection = None

    async def _ask(self, request: bytes, watch: Stopwatch, gaps: Stopwatch | None) -> Answer | None:
        """Send a request; return None if the connection ended before any data."""
        if self._connection is None:
            self._connection = await Connection(self._port).__aenter__()
        received, part = b"", b""
        with suppress(ConnectionError):
            await self._connection.send(request)
            while part := await self._connection.read():
                received += part
                if gaps is not None:
                    watch.lap()
                    if b"data: " in received:  # the head may come long before the first token
                        gaps.lap()
                answer = parse(received) if _may_be_whole(received) else None
                if answer is not None and answer.is_whole:
                    if answer.headers.get("connection") == "close":
                        await self.aclose()
                    return answer
        await self.aclose()
        if received:
            raise WrongAnswerError("the connection ended within an answer")
        return None


def _may_be_whole(received: bytes) -> bool:
    """Return whether a response may be complete, before it is parsed."""
    top, _, _ = received[:1024].partition(b"\r\n\r\n")
    return b"chunked" not in top.lower() or received.endswith(b"0\r\n\r\n")


@dataclass(slots=True)
class Bystanders:
    """All bystanders and their measurements."""

    port: int
    pid: int
    is_sent_ids: bool = False
    deadline_s: float | None = None
    api_key: str | None = None
    stream: Stopwatch = field(default_factory=Stopwatch)
    gaps: Stopwatch = field(default_factory=Stopwatch)
    health: Stopwatch = field(default_factory=Stopwatch)
    completion: Stopwatch = field(default_factory=Stopwatch)
    own_delay_s: float = 0.0
    peak_bytes: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    async def start(self) -> None:
        """Run the seeded request alone, then start all clients."""
        known = self._known()
        async with aclosing(Session(self.port)) as session:
            answer = await session.ask(self._keep_alive(known.without_drafts()), Stopwatch())
        expected = essence(known, must_be_whole(answer).body, streamed=False)
        running = (
            self._watch_own_delay(),
            self._watch_memory(),
            self._ask_health(),
            self._stream(),
            self._complete(),
            self._ask_known(known, expected),
        )
        self._tasks = [asyncio.ensure_future(one) for one in running]

    async def stop(self) -> None:
        """Stop all clients; raises their unexpected exceptions."""
        for watch in (self.stream, self.gaps, self.health, self.completion):
            watch.stop()
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def figures(self) -> dict[str, Any]:
        """Return the measurements so far."""
        return {
            "stream_ms": round(1000 * self.stream.read(), 1),
            "gap_ms": round(1000 * self.gaps.read(), 1),
            "health_ms": round(1000 * self.health.read(), 1),
            "completion_ms": round(1000 * self.completion.read(), 1),
            "own_delay_ms": round(1000 * self.own_delay_s, 1),
            "bystanders": dict(self.fates),
        }

    def _prompt(self) -> str | list[int]:
        return _PROMPT_IDS if self.is_sent_ids else _PROMPT

    def _known(self) -> Ask:
        body = {"prompt": self._prompt(), "seed": 11, "max_tokens": 40, "logprobs": 2}
        return Ask("known", COMPLETIONS, {**body, "return_token_ids": True})

    async def _ask_health(self) -> None:
        request = get("/health").replace(b"connection: close", b"connection: keep-alive")
        async with aclosing(Session(self.port)) as session:
            while True:
                await self._ask(session, request, self.health)
                await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _complete(self) -> None:
        headers = {} if self.deadline_s is None else {"x-request-timeout-s": f"{self.deadline_s:g}"}
        body = {"prompt": self._prompt(), "max_tokens": 1}
        request = self._keep_alive(Ask("one", COMPLETIONS, body), headers)
        async with aclosing(Session(self.port)) as session:
            while True:
                await self._ask(session, request, self.completion)
                await asyncio.sleep(_COMPLETION_INTERVAL_S)

    async def _stream(self) -> None:
        body = {"prompt": self._prompt(), "max_tokens": 450, "ignore_eos": True, "stream": True}
        request = self._keep_alive(Ask("stream", COMPLETIONS, body))
        async with aclosing(Session(self.port)) as session:
            while True:
                answer = await self._ask(session, request, self.stream, self.gaps)
                if answer is not None and answer.status == 200:
                    self.fates[LOST] += not _is_whole_stream(answer.body)

    async def _ask_known(self, known: Ask, expected: Mapping[str, Any]) -> None:
        async with aclosing(Session(self.port)) as session:
            while True:
                answer = await self._ask(session, self._keep_alive(known), Stopwatch())
                if answer is not None and answer.status == 200:
                    actual = essence(known, answer.body, streamed=False)
                    self.fates[OTHER_BITS] += actual != expected
                await asyncio.sleep(_KNOWN_INTERVAL_S)

    async def _ask(
        self,
        session: Session,
        request: bytes,
        watch: Stopwatch,
        gaps: Stopwatch | None = None,
    ) -> Answer | None:
        """Send a request and count its fate; return None for a lost response."""
        try:
            answer = await session.ask(request, watch, gaps)
        except (OSError, WrongAnswerError):
            self.fates[LOST] += 1
            await asyncio.sleep(_RETRY_INTERVAL_S)
            return None
        fate = _fate(answer)
        self.fates[fate] += 1
        if fate == REFUSED:
            await asyncio.sleep(_RETRY_INTERVAL_S)
        return answer

    def _keep_alive(self, ask: Ask, headers: Mapping[str, str] | None = None) -> bytes:
        body = json.dumps(ask.body).encode()
        key = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        return post(ask.path, body, **{"connection": "keep-alive", **key, **(headers or {})})

    async def _watch_own_delay(self) -> None:
        while True:
            slept_from_s = time.monotonic()
            await asyncio.sleep(HEALTH_INTERVAL_S)
            delay_s = time.monotonic() - slept_from_s - HEALTH_INTERVAL_S
            self.own_delay_s = max(self.own_delay_s, delay_s)

    async def _watch_memory(self) -> None:
        while True:
            size_bytes = await asyncio.to_thread(tree_bytes, self.pid)
            self.peak_bytes = max(self.peak_bytes, size_bytes or 0)
            await asyncio.sleep(_MEMORY_INTERVAL_S)


def _is_whole_stream(body: bytes) -> bool:
    try:
        return len(list(read_events(body))) > 0
    except (WrongAnswerError, ValueError):
        return False


def _fate(answer: Answer) -> str:
    if answer.status == 200:
        return OK
    return REFUSED if answer.status in (429, 503) else f"status {answer.status}"


async def _watch_until_told(port: int, pid: int) -> dict[str, Any]:
    bystanders = Bystanders(port, pid)
    await bystanders.start()
    print(BEGUN, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await bystanders.stop()
    return {**bystanders.figures(), "peak_bytes": bystanders.peak_bytes}


def main() -> int:
    """Measure a running server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=positive, required=True, help="port on this machine")
    parser.add_argument("--pid", type=positive, required=True, help="the server's process")
    parsed = parser.parse_args()
    print(json.dumps(asyncio.run(_watch_until_told(parsed.port, parsed.pid))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
