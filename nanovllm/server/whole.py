"""What the routes that give a whole answer have in common: waiting for requests while the client is there, and writing the answer as JSON."""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.engine.admission import Reservation
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.intake import Submission
from nanovllm.outputs import RequestOutput
from nanovllm.server.deadlines import deadline_of
from nanovllm.server.streaming import is_large, unless_gone


async def finish_all(
    engine: AsyncEngine,
    request: Request,
    submissions: Sequence[Submission],
    *,
    within: Reservation | None = None,
) -> list[RequestOutput]:
    """Queue checked requests, all or none, and wait for the whole answer of each; `within` is room that was reserved for them.

    The first part that ends with an error ends all of them. Whatever is unfinished when this ends is
    aborted. Raises ClientGoneError when the client closes its connection, QueueFullError, and
    what the engine raises.
    """
    readers = engine.submit_all(submissions, deadline=deadline_of(request), within=within)

    async def wait() -> list[RequestOutput]:
        return [await engine.finish(reader) for reader in readers]

    try:
        return await unless_gone(request, wait())
    finally:
        engine.leave(readers)


def client_gone() -> Response:
    """What is answered to a client that is not there any more: nobody reads it."""
    return Response(status_code=499)


async def whole_answer(
    head: Mapping[str, object],
    choices: Iterator[Mapping[str, object]],
    usage: Mapping[str, object],
    outputs: Sequence[RequestOutput],
) -> Response:
    """The answer whose choices are made of `outputs`; a large one is written beside the event loop, where it would hold up everybody's stream."""
    if is_large(outputs):
        content = await asyncio.to_thread(write_answer, head, choices, usage)
    else:
        content = write_answer(head, choices, usage)
    return Response(content, media_type="application/json")


def write_answer(
    head: Mapping[str, object], choices: Iterator[Mapping[str, object]], usage: Mapping[str, object]
) -> bytes:
    """The JSON, choice by choice: writing all at once would hold the interpreter for as long as it takes, and all choices in memory."""
    written = b",".join(_json(choice) for choice in choices)
    return _json(head)[:-1] + b',"choices":[' + written + b'],"usage":' + _json(usage) + b"}"


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
