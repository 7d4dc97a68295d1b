"""Wait on the event loop until the grammar of a request is compiled, so that an error in it is a 400 also of a streamed answer."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.requests import Request

from nanovllm.engine.grammar.grammar import CompiledGrammar
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.openai.streaming import unless_gone
from nanovllm.server.openai.structured import StructuredFields, in_sent_fields


async def wait_for_grammar(
    request: Request, prepared_requests: Sequence[PreparedRequest], fields: StructuredFields | None
) -> None:
    """Return once the grammar that all of `prepared_requests` follow is compiled, or the request's deadline has passed.

    Where the client closes its connection meanwhile, or the deadline passes, nobody may wait for the grammar any more, and compiling
    ends at once. Raises ClientDisconnectedError, InvalidRequestError where the grammar cannot be used, QueueFullError.
    """
    grammar = prepared_requests[0].grammar
    if grammar is None:
        return
    deadline = deadline_of(request)
    left_s = None if deadline is None else deadline.at_s - time.monotonic()
    try:
        await unless_gone(request, asyncio.wait_for(_settled(grammar), left_s))
    except asyncio.TimeoutError:
        return  # submitting it says so
    if isinstance(grammar.error, InvalidRequestError):
        raise in_sent_fields(grammar.error, fields)
    if grammar.error is not None:
        raise grammar.error


async def _settled(grammar: CompiledGrammar) -> None:
    loop, settled = asyncio.get_running_loop(), asyncio.Event()

    def watcher() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settled.set)

    grammar.watch(watcher)
    try:
        await settled.wait()
    finally:
        grammar.unwatch(watcher)
