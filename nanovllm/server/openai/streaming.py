"""Answers while they grow: server-sent events, and what happens when the client goes away.

A client that closes its connection ends its requests: the task that follows them is cancelled, and the engine aborts what is
unfinished. Between two writes news merge, so a slow handle gets larger chunks and holds nobody up; one that takes nothing at all
counts as gone after a while. While a stream has nothing to send, because its request waits in the
queue, comments keep the connection alive: proxies close connections that are idle.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.outputs import RequestOutput
from nanovllm.server.http.errors import ClientDisconnectedError, response_for, status_of
from nanovllm.server.http.json_writer import write_json
from nanovllm.server.openai.completions import ChoiceFormatter, CompletionCall, usage
from nanovllm.server.openai.response_types import CompletionChoice, Usage
from nanovllm.server.openai.schemas import StreamOptions

T = TypeVar("T")
Write: TypeAlias = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a call beside the event loop and gives its result."""

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
"""Time without an event after which a stream sends a comment. Proxies wait for 30 s and more."""
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
MAX_WRITE_BYTES = 1 << 18  # handed on in one call
MANY_POSITIONS = 128  # with 20 log-probabilities each they take about 20 ms


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection; then ClientDisconnectedError."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class PieceResponse(Response):
    """A response whose pieces are written as they come, and whose source is closed when the client goes away."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        stalled_after_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        on_close: Callable[[], None] = lambda: None,
        keep_alive_s: float | None = None,
    ) -> None:
        """Send `pieces` one after the other.

        Args:
            stalled_after_s: a client that has taken nothing for this long, and up to twice as long, counts as gone.
            on_close: called at the end in any case, even where the pieces never began.
            keep_alive_s: send a comment of server-sent events after this time without a piece; None for never.
        """
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._pieces = pieces
        self._on_close = on_close
        self._stalled_after_s = stalled_after_s
        self._keep_alive_s = keep_alive_s
        self._sending = asyncio.Lock()  # held while a piece or a comment is sent
        self._sending_since_s: float | None = None
        self._sent_at_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the pieces end or the client is gone."""
        writer = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            while not await self._is_over(writer, gone):
                pass
        finally:
            self._on_close()
            for task in (writer, gone):
                task.cancel()
            results = await asyncio.gather(writer, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _is_over(self, writer: "asyncio.Future[None]", gone: "asyncio.Future[None]") -> bool:
        """Wait for the end of the pieces or of the connection, but no longer than it takes to find a stalled client."""
        done, _ = await asyncio.wait(
            {writer, gone}, timeout=self._stalled_after_s, return_when=asyncio.FIRST_COMPLETED
        )
        if done:
            return True
        since_s = self._sending_since_s
        is_stalled = since_s is not None and time.monotonic() - since_s >= self._stalled_after_s
        if is_stalled:
            logger.warning(
                "a client has read nothing of its answer for %g s; its requests end",
                self._stalled_after_s,
            )
        return is_stalled

    async def _write(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await self._pass_on({"type": "http.response.start", **start}, send)
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    async with self._sending:
                        await self._write_piece(piece, send)
        finally:
            keep_alive.cancel()
            await asyncio.gather(keep_alive, return_exceptions=True)
        await self._pass_on({"type": "http.response.body", "body": b"", "more_body": False}, send)

    async def _write_piece(self, piece: bytes, send: Send) -> None:
        for at in range(0, len(piece), MAX_WRITE_BYTES):
            await self._pass_on(_body_part(piece[at : at + MAX_WRITE_BYTES]), send)
            if len(piece) > MAX_WRITE_BYTES:  # handing on megabytes takes long too
                await asyncio.sleep(0)

    async def _pass_on(self, message: Message, send: Send) -> None:
        """Send a message; returns once the client has taken enough of what was sent before."""
        self._sending_since_s = time.monotonic()
        await send(message)
        self._sending_since_s = None
        self._sent_at_s = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for `keep_alive_s`, never inside of a piece."""
        limit_s = self._keep_alive_s
        while limit_s is not None:
            async with self._sending:
                idle_s = time.monotonic() - self._sent_at_s
                if idle_s >= limit_s:
                    await self._pass_on(_body_part(KEEP_ALIVE_COMMENT), send)
                    idle_s = 0.0
            await asyncio.sleep(limit_s - idle_s)


def _body_part(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}


class EventStream(PieceResponse):
    """Server-sent events, whose source is closed when the client goes away."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_close: Callable[[], None],
        stalled_after_s: float,
    ) -> None:
        """Send `events` one after the other, and comments meanwhile; the arguments are those of PieceResponse."""
        super().__init__(
            events,
            "text/event-stream",
            stalled_after_s,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            on_close=on_close,
            keep_alive_s=KEEP_ALIVE_S,
        )


def completion_events(
    job: CompletionCall, engine: AsyncEngine, handles: list[RequestHandle], write: Write
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed completion; `write` runs what takes long beside the event loop."""
    formatters: dict[int, ChoiceFormatter] = {}

    def choices_of(place: int, output: RequestOutput) -> list[CompletionChoice]:
        choices: list[CompletionChoice] = []
        for answer in output.outputs:
            index = place * job.n + answer.index
            formatter = formatters.get(index) or formatters.setdefault(
                index, ChoiceFormatter(job, output)
            )
            choice = formatter.choice(index, answer, output)
            if any(value for name, value in choice.items() if name != "index"):  # it says something
                choices.append(choice)
        return choices

    head = {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}
    return answer_events(
        head,
        job.body.stream_options,
        job.prepared_requests,
        merge(engine, handles),
        choices_of,
        write,
    )


async def answer_events(
    head: Mapping[str, Any],
    options: StreamOptions | None,
    prepared_requests: Sequence[PreparedRequest],
    news: AsyncGenerator[tuple[int, RequestOutput], None],
    choices_of: Callable[[int, RequestOutput], Sequence[Mapping[str, Any]]],
    write: Write,
    *,
    prompt_fields: Callable[[RequestOutput], Mapping[str, Any]] = lambda _: {},
) -> AsyncGenerator[bytes, None]:
    """The chunks of a streamed answer, `[DONE]` last; an error on the way is an event of its own before it.

    A chunk has one choice, since that is where programs look. Those of a step are written together.

    Args:
        head: what every chunk has.
        news: of the requests of `prepared_requests`, each with its place among them.
        choices_of: (place, news) to what is new of the choices, none where there is nothing to show.
        write: runs what takes long beside the event loop.
        prompt_fields: the first news to the fields about the prompt that the first chunk has beside its choice.
    """
    usage_on = options is not None and options.include_usage
    counter = UsageCounter(prepared_requests)

    is_first = True

    def events_of(place: int, part: RequestOutput) -> list[bytes]:
        nonlocal is_first
        extra: dict[str, Any] = {}
        if usage_on:
            is_continuous = options is not None and options.continuous_usage_stats
            extra = {"usage": counter.usage() if is_continuous else None}
        encode = _large_event if is_large([part]) else event
        events = []
        for choice in choices_of(place, part):
            first = prompt_fields(part) if is_first else {}
            is_first = False
            events.append(encode({**head, "choices": [choice], **extra, **first}))
        return events

    try:
        async with aclosing(news) as pieces:
            async for place, output in pieces:
                counter.add(place, output)
                for part in _parts(output):
                    if is_large([part]):
                        events = await write(partial(events_of, place, part))
                    else:
                        events = events_of(place, part)
                    if events:
                        yield b"".join(events)
        if usage_on:
            yield event({**head, "choices": [], "usage": counter.usage()})
    except (
        Exception
    ) as error:  # the status line is sent already: the reason can only follow in the stream
        if status_of(error) == 500:
            logger.error("%s ended with an error", head["id"], exc_info=error)
        yield b"data: " + bytes(response_for(error).body) + b"\n\n"
    yield b"data: [DONE]\n\n"


def is_large(outputs: Sequence[RequestOutput]) -> bool:
    """Whether they take so long to write as JSON that it must not be done on the event loop: log-probabilities of many positions."""
    prompts = sum(len(output.prompt_logprobs or ()) * len(output.outputs) for output in outputs)
    return (
        prompts + sum(len(answer.logprobs or ()) for output in outputs for answer in output.outputs)
        > MANY_POSITIONS
    )


def _parts(output: RequestOutput) -> list[RequestOutput]:
    """News in pieces that are not larger than one choice, where all together are large."""
    if len(output.outputs) == 1 or not is_large([output]):
        return [output]
    return [replace(output, outputs=[answer]) for answer in output.outputs]


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return (
        b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


def _large_event(body: dict[str, Any]) -> bytes:
    return b"data: " + write_json(body) + b"\n\n"


class UsageCounter:
    """Adds up the tokens of a stream's pieces."""

    def __init__(self, prepared_requests: Sequence[PreparedRequest]) -> None:
        """Count the prompts at once, answers as they come."""
        self._prompt_tokens = sum(
            len(prepared.requests[0].prompt_token_ids) for prepared in prepared_requests
        )
        self._completion_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}

    def add(self, place: int, output: RequestOutput) -> None:
        """Count a piece of the answers to prompt number `place`, which says how many tokens there are so far."""
        self._completion_tokens[place] = output.num_generated_tokens
        self._cached_tokens[place] = output.num_cached_tokens

    def usage(self) -> Usage:
        """The `usage` object so far."""
        return usage(
            self._prompt_tokens,
            sum(self._completion_tokens.values()),
            sum(self._cached_tokens.values()),
        )


async def merge(
    engine: AsyncEngine, handles: list[RequestHandle]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The news of several requests as they come, each with its prompt's number."""
    if len(handles) == 1:  # nothing to wait for side by side, which costs a task for each piece
        async with aclosing(engine.follow(handles[0])) as news:
            async for output in news:
                yield 0, output
        return
    streams = [engine.follow(handle) for handle in handles]
    waiting = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                place = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                yield place, output
                waiting[asyncio.ensure_future(anext(streams[place]))] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
