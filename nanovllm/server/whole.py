"""What the routes that give a whole answer have in common: waiting for requests while the client is there."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.engine.admission import Reservation
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.intake import Submission
from nanovllm.outputs import RequestOutput
from nanovllm.server.deadlines import deadline_of
from nanovllm.server.streaming import unless_gone


async def finish_all(
    engine: AsyncEngine, request: Request, submissions: Sequence[Submission], *, within: Reservation | None = None
) -> list[RequestOutput]:
    """Queue checked requests, all or none, and wait for the whole answer of each; `within` is room that was reserved for them.

    Whatever is unfinished when this ends is aborted. Raises ClientGoneError when the client closes its connection, QueueFullError, and
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
