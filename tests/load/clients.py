"""Clients of a server under load: good, slow, leaving, stalled, dripping and malformed ones.

Each is a loop that draws its next request from a seeded generator and records its fate.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.load.ledger import (
    ANSWERED,
    CUT,
    LEFT,
    Ledger,
    WrongAnswerError,
    check_error,
    check_shape,
    essence,
    first_difference,
    must_be_whole,
    read_refusal,
)
from tests.load.requests import (
    COMPLETIONS,
    EMBEDDINGS,
    MAX_BODY_BYTES,
    Ask,
    any_ask,
    bad_ask,
    heavy_ask,
    long_ask,
    oversized_request,
    text_ask,
)
from tests.load.wire import Answer, Connection, get, parse, post

PATIENCE_S = 120.0  # timeout of a response
_TIDE_S, _EBB_S, _STEADY = 15.0, 4.0, 0.15
"""In _EBB_S of each _TIDE_S, all but _STEADY of the clients pause, so that large requests fit."""
_PAUSE_S = (0.0, 0.1)  # between two requests of one client
_REFUSED_PAUSE_S = (0.2, 1.0)  # after 429; Retry-After is 1 s
_PATHS = ("/health", "/metrics", "/load", "/v1/models", "/version")


@dataclass(slots=True)
class Load:
    """State shared by all clients: the server, known outputs, the ledger, and the end."""

    port: int
    known: Sequence[tuple[Ask, Mapping[str, Any]]]
    ledger: Ledger
    stalled_client_s: float
    max_body_bytes: int = MAX_BODY_BYTES
    is_over: asyncio.Event = field(default_factory=asyncio.Event)


async def ask_once(port: int, ask: Ask) -> dict[str, Any]:
    """Return the essence of a response; raises WrongAnswerError if it is refused."""
    async with Connection(port) as connection:
        await connection.send(post(ask.path, ask.body))
        answer = must_be_whole(parse(await connection.read_all()))
    if answer.status != 200:
        raise WrongAnswerError(f"{ask.kind}: status {answer.status}: {answer.body[:300]!r}")
    return essence(ask, answer.body, streamed=False)


class Client:
    """One client; `way` is one of WAYS, or "any" for the mix of MIX."""

    def __init__(self, load: Load, way: str, seed: int) -> None:
        """Create the client's own generator."""
        self._load = load
        self._way = way
        self._draw = random.Random(seed)
        self._was_refused = False
        self._ebbs = way == "any" and self._draw.random() > _STEADY

    async def run(self) -> None:
        """Send requests until the load is over."""
        while not self._load.is_over.is_set():
            if self._ebbs and time.monotonic() % _TIDE_S < _EBB_S:
                await asyncio.sleep(0.2)
                continue
            way = (
                self._draw.choices(list(MIX), list(MIX.values()))[0]
                if self._way == "any"
                else self._way
            )
            self._was_refused = False
            await WAYS[way](self)
            await asyncio.sleep(
                self._draw.uniform(*(_REFUSED_PAUSE_S if self._was_refused else _PAUSE_S))
            )

    def _connection(self, *, small_buffer: bool = False) -> Connection:
        return Connection(self._load.port, small_buffer=small_buffer)

    async def _read_all(self, connection: Connection) -> Answer:
        """Read a complete response up to the end of the connection."""
        return must_be_whole(parse(await self._in_time(connection.read_all())))

    async def _read_one(self, connection: Connection) -> Answer:
        """Read one response on a connection that stays open."""
        received = b""
        while True:
            part = await self._in_time(connection.read())
            received += part
            answer = parse(received)
            if answer is not None and answer.is_whole:
                return answer
            if not part:
                return must_be_whole(answer)

    async def _in_time(self, reading: Awaitable[bytes]) -> bytes:
        try:
            return await asyncio.wait_for(reading, PATIENCE_S)
        except asyncio.TimeoutError as error:
            raise WrongAnswerError(f"no answer in {PATIENCE_S:g} s") from error

    def _judge(
        self, ask: Ask, answer: Answer, expected: Mapping[str, Any] | None, *, streamed: bool
    ) -> str:
        """Return the fate of a request; raises WrongAnswerError for a wrong response."""
        refusal = self._read_refusal(answer)
        if refusal is not None:
            return refusal
        actual = essence(ask, answer.body, streamed=streamed)
        if expected is None:
            check_shape(ask, actual)
        elif actual != expected:
            raise WrongAnswerError(
                f"other bits than alone: {first_difference(expected, actual)} "
                f"in answer to {ask.body}"
            )
        self._load.ledger.checked += expected is not None
        if ask.path == COMPLETIONS:
            self._load.ledger.generated_tokens += actual["tokens"][1]
        return ANSWERED

    def _read_refusal(self, answer: Answer) -> str | None:
        """Call `read_refusal`; a refused client waits longer before its next request."""
        refusal = read_refusal(answer)
        self._was_refused = refusal is not None
        return refusal

    def _known(self) -> tuple[Ask, Mapping[str, Any]]:
        return self._draw.choice(self._load.known)

    def _may_stream(self, ask: Ask) -> bool:
        return ask.path == COMPLETIONS and ask.kind not in ("best_of", "beams")

    async def known(self) -> None:
        """Send a request with a known output, streamed or not."""
        ask, expected = self._known()
        await self._good(
            ask, expected, streamed=self._may_stream(ask) and self._draw.random() < 0.6
        )

    async def random(self) -> None:
        """Send a random request."""
        await self._good(any_ask(self._draw), None, streamed=self._draw.random() < 0.5)

    async def _good(self, ask: Ask, expected: Mapping[str, Any] | None, *, streamed: bool) -> None:
        with self._load.ledger.request(f"{ask.kind}{', stream' if streamed else ''}") as entry:
            async with self._connection() as connection:
                await connection.send(post(ask.path, _streaming(ask) if streamed else ask.body))
                entry.fate = self._judge(
                    ask, await self._read_all(connection), expected, streamed=streamed
                )

    async def slow(self) -> None:
        """Read a stream slowly; its output is unchanged."""
        while (known := self._known())[0].path == EMBEDDINGS or not self._may_stream(known[0]):
            pass
        ask, expected = known
        with self._load.ledger.request("slow reader") as entry:
            async with self._connection(small_buffer=True) as connection:
                await connection.send(post(ask.path, _streaming(ask)))
                parts = []
                while part := await self._in_time(connection.read(self._draw.randint(200, 3000))):
                    parts.append(part)
                    await asyncio.sleep(self._draw.uniform(0, 0.05))
                entry.fate = self._judge(
                    ask, must_be_whole(parse(b"".join(parts))), expected, streamed=True
                )

    async def stalled(self) -> None:
        """Stop reading a large response until the server must have closed the connection."""
        ask, streamed = heavy_ask(self._draw), self._draw.random() < 0.7
        with self._load.ledger.request(f"stalled reader{', stream' if streamed else ''}") as entry:
            async with self._connection(small_buffer=True) as connection:
                await connection.send(post(ask.path, _streaming(ask) if streamed else ask.body))
                begun = await self._in_time(connection.read(2000))
                if begun.split(b" ", 2)[1:2] != [b"200"]:
                    entry.fate = (
                        self._read_refusal(
                            must_be_whole(parse(begun + await connection.read_all()))
                        )
                        or ANSWERED
                    )
                    return
                await asyncio.sleep(3 * self._load.stalled_client_s)
                answer = parse(begun + await self._in_time(connection.read_all()))
                entry.fate = ANSWERED if answer is not None and answer.is_whole else CUT

    async def leaves_before(self) -> None:
        """Disconnect after a part of the head."""
        await self._leave(
            "left before the request",
            post(COMPLETIONS, any_ask(self._draw).body)[: self._draw.randint(0, 80)],
        )

    async def leaves_in_the_body(self) -> None:
        """Disconnect in the body."""
        request = post(COMPLETIONS, {"prompt": "a" * 5000})
        await self._leave("left in the body", request[: self._draw.randint(200, len(request) - 1)])

    async def leaves_after(self) -> None:
        """Disconnect after the request."""
        ask = long_ask(self._draw)
        await self._leave(
            "left after the request",
            post(ask.path, _streaming(ask) if self._draw.random() < 0.5 else ask.body),
        )

    async def _leave(self, kind: str, request: bytes) -> None:
        with self._load.ledger.request(kind) as entry:
            async with self._connection() as connection:
                await connection.send(request)
                await asyncio.sleep(self._draw.choice([0, 0, 0.01, 0.1, 0.5]))
                self._part(connection)
            entry.fate = LEFT

    async def leaves_in_the_middle(self) -> None:
        """Disconnect in a stream."""
        ask = long_ask(self._draw)
        with self._load.ledger.request("left in the middle") as entry:
            async with self._connection() as connection:
                await connection.send(post(ask.path, _streaming(ask)))
                received = await self._in_time(connection.read())
                if received.split(b" ", 2)[1:2] != [b"200"]:
                    entry.fate = (
                        self._read_refusal(
                            must_be_whole(parse(received + await connection.read_all()))
                        )
                        or LEFT
                    )
                    return
                for _ in range(self._draw.randint(0, 8)):
                    await self._in_time(connection.read())
                self._part(connection)
            entry.fate = LEFT

    def _part(self, connection: Connection) -> None:
        """Disconnect by FIN or by a reset."""
        if self._draw.random() < 0.5:
            connection.reset_on_close()

    async def half_closes(self) -> None:
        """Half-close the connection after the request."""
        ask = long_ask(self._draw)
        with self._load.ledger.request("half closed") as entry:
            async with self._connection() as connection:
                await connection.send(post(ask.path, _streaming(ask)))
                with suppress(OSError):  # refused, and closed, already
                    connection.end_sending()
                await self._in_time(connection.read_all())
            entry.fate = LEFT

    async def bad(self) -> None:
        """Send an invalid request."""
        path, body, status = bad_ask(self._draw)
        with self._load.ledger.request("malformed") as entry:
            async with self._connection() as connection:
                await connection.send(post(path, body))
                answer = await self._read_all(connection)
                check_error(answer, status, 429)  # where there is no room, that is said first
                entry.fate = f"refused {answer.status}"

    async def oversized(self) -> None:
        """Send a body over the limit, its length declared or not."""
        is_declared = self._draw.random() < 0.5
        request, statuses = oversized_request(self._load.max_body_bytes, is_declared=is_declared)
        with self._load.ledger.request("oversized") as entry:
            async with self._connection() as connection:
                sending = asyncio.ensure_future(connection.send(request))
                try:
                    answer = await self._read_one(connection)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
                check_error(answer, *statuses, 429)  # where bodies have no room, that is first
                entry.fate = f"refused {answer.status}"

    async def garbage(self) -> None:
        """Send malformed HTTP."""
        noise = [
            self._draw.randbytes(self._draw.randint(1, 4000)) + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
            b"GET /nope HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ]  # fmt: skip
        with self._load.ledger.request("no HTTP") as entry:
            async with self._connection() as connection:
                try:
                    await connection.send(self._draw.choice(noise))
                    connection.end_sending()
                except OSError:  # refused, and closed, while it was being sent
                    pass
                answer = parse(await self._in_time(connection.read_all()))
                if answer is not None and answer.status not in (400, 404):
                    raise WrongAnswerError(f"noise was answered with {answer.status}")
                entry.fate = "refused 400" if answer is not None else CUT

    async def dripping(self) -> None:
        """Send nothing, or a head or body byte by byte, until the server ends the connection."""
        body = b'{"prompt": "' + b" " * 100_000
        start = self._draw.choice([b"", b"POST /v1/comp", post(COMPLETIONS, body)[:300]])
        with self._load.ledger.request("dripping") as entry:
            async with self._connection() as connection:
                await connection.send(start)
                reading = asyncio.ensure_future(self._in_time(connection.read_all()))
                while not reading.done():
                    try:
                        if start:
                            await connection.send(b" ")
                    except ConnectionError:
                        break
                    await asyncio.wait({reading}, timeout=0.2)
                received = await reading
                if received:
                    check_error(parse(received), 408)
                entry.fate = "refused 408" if received else CUT

    async def texts(self) -> None:
        """Tokenize or detokenize."""
        ask = text_ask(self._draw)
        with self._load.ledger.request(ask.kind) as entry:
            async with self._connection() as connection:
                await connection.send(post(ask.path, ask.body))
                answer = await self._read_all(connection)
                entry.fate = self._read_refusal(answer) or ANSWERED

    async def polls(self) -> None:
        """Poll status endpoints on one connection."""
        async with self._connection() as connection:
            for _ in range(self._draw.randint(1, 4)):
                with self._load.ledger.request("poll") as entry:
                    await connection.send(
                        get(self._draw.choice(_PATHS)).replace(
                            b"connection: close", b"connection: keep-alive"
                        )
                    )
                    answer = await self._read_one(connection)
                    entry.fate = self._read_refusal(answer) or ANSWERED


def _streaming(ask: Ask) -> dict[str, Any]:
    return {**ask.body, "stream": True, "stream_options": {"include_usage": True}}


WAYS: Mapping[str, Callable[[Client], Awaitable[None]]] = {
    "known": Client.known, "random": Client.random, "slow": Client.slow,
    "stalled": Client.stalled, "leaves before": Client.leaves_before,
    "leaves in the body": Client.leaves_in_the_body, "leaves after": Client.leaves_after,
    "leaves in the middle": Client.leaves_in_the_middle, "half closes": Client.half_closes,
    "bad": Client.bad, "oversized": Client.oversized, "garbage": Client.garbage,
    "dripping": Client.dripping, "texts": Client.texts, "polls": Client.polls,
}  # fmt: skip

MIX: Mapping[str, float] = {
    "known": 35, "random": 20, "leaves before": 3, "leaves in the body": 4, "leaves after": 7,
    "leaves in the middle": 10, "half closes": 3, "bad": 8, "oversized": 3, "garbage": 3,
    "texts": 4, "polls": 4,
}  # fmt: skip
"""Weights of the ways of mixed clients; slow, stalled and dripping clients do nothing else."""
