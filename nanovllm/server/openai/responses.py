"""What the routes that give a whole answer have in common: waiting for requests while the client is there, and writing the answer as JSON."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.engine.admission import Reservation
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.outputs import RequestOutput
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.json_writer import write_json
from nanovllm.server.openai.streaming import (
    MAX_WRITE_BYTES,
    PieceResponse,
    Write,
    is_large,
    unless_gone,
)


async def finish_all(
    engine: AsyncEngine,
    request: Request,
    prepared_requests: Sequence[PreparedRequest],
    *,
    within: Reservation | None = None,
) -> list[RequestOutput]:
    """Queue checked requests, all or none, and wait for the whole answer of each; `within` is room that was reserved for them.

    The first part that ends with an error ends all of them. Whatever is unfinished when this ends is
    aborted. Raises ClientDisconnectedError when the client closes its connection, QueueFullError, and
    what the engine raises.
    """
    handles = engine.submit_all(prepared_requests, deadline=deadline_of(request), within=within)

    async def wait() -> list[RequestOutput]:
        return [await engine.finish(handle) for handle in handles]

    try:
        return await unless_gone(request, wait())
    finally:
        engine.leave(handles)


async def whole_answer(
    head: Mapping[str, object],
    choices: Iterator[Mapping[str, object]],
    usage: Mapping[str, object],
    outputs: Sequence[RequestOutput],
    write: Write,
    stalled_after_s: float,
    *,
    prompt_fields: Callable[[], Mapping[str, object]] = dict,
) -> Response:
    """The answer whose choices are made of `outputs`; a large one is made beside the event loop, choice by choice as the client takes it.

    So the JSON of one choice is in memory at a time, and no call keeps the interpreter for as long as all of it takes.
    `prompt_fields` makes the fields about the prompt that stand beside the choices.
    """
    if not is_large(outputs):
        body = {**head, "choices": list(choices), "usage": usage, **prompt_fields()}
        return Response(_json(body), media_type="application/json")
    pieces = _pieces(head, choices, usage, write, prompt_fields)
    return PieceResponse(pieces, "application/json", stalled_after_s)


async def _pieces(
    head: Mapping[str, object],
    choices: Iterator[Mapping[str, object]],
    usage: Mapping[str, object],
    write: Write,
    prompt_fields: Callable[[], Mapping[str, object]],
) -> AsyncGenerator[bytes, None]:
    def next_choice() -> bytes:
        choice = next(choices, None)
        return b"" if choice is None else write_json(choice)

    separator = _json(head)[:-1] + b',"choices":['
    while choice := await write(next_choice):
        yield separator + choice
        separator = b","
    rest = await write(lambda: write_json({"usage": usage, **prompt_fields()}))
    yield b"]," + rest[1:]


def json_response(content: bytes, stalled_after_s: float) -> Response:
    """An answer that is JSON already; a large one is handed on as the client takes it."""
    if len(content) <= MAX_WRITE_BYTES:
        return Response(content, media_type="application/json")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield content

    return PieceResponse(whole(), "application/json", stalled_after_s)


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
