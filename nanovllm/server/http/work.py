"""What a request makes the server do beside the event loop: read and check its body, tokenize its texts, write a large answer.

Small requests have threads of their own, so that they do not wait for large ones. So have those that wait for a template or a grammar,
which are made in processes of their own with limits of time. Within each group clients take turns.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.event_stream import unless_disconnected
from nanovllm.server.http.request_log import record_of
from nanovllm.server.http.workers import FairWorkers

T = TypeVar("T")
SMALL_BYTES = 1 << 15
"""Bodies up to here are small: reading one and tokenizing its texts takes some milliseconds."""
MAX_WAITING = 1024
MAX_WAITING_LARGE = 64
"""Requests whose bodies, of up to 4 MB, are kept until they are read; one more is refused."""

_NUM_SMALL, _NUM_LARGE, _NUM_GUARDED, _NUM_WRITERS = 2, 2, 4, 2


class Work:
    """The threads of one server."""

    def __init__(self, engine: AsyncEngine) -> None:
        """Work for requests to `engine`."""
        self._engine = engine
        self._small = FairWorkers("nanovllm-small", _NUM_SMALL, MAX_WAITING)
        self._large = FairWorkers("nanovllm-large", _NUM_LARGE, MAX_WAITING_LARGE)
        self._guarded = FairWorkers("nanovllm-guarded", _NUM_GUARDED, MAX_WAITING)
        self._writers = FairWorkers("nanovllm-writer", _NUM_WRITERS, MAX_WAITING)

    async def read(
        self, request: Request, num_bytes: int, call: Callable[[], T], *, is_guarded: bool = False
    ) -> T:
        """The result of a call that reads, checks or tokenizes what a request of `num_bytes` says.

        Args:
            is_guarded: it waits for a process with limits of its own, and takes little time itself.

        Raises:
            ClientDisconnectedError: the client closed its connection.
            RequestTimeoutError: the request's time is over.
            QueueFullError: too many requests wait to be read.
        """
        workers = self._small if num_bytes <= SMALL_BYTES else self._large
        workers = self._guarded if is_guarded else workers
        deadline = deadline_of(request)
        if deadline is None:
            work = workers.run(record_of(request).client, call)
        else:
            work = workers.run(
                record_of(request).client,
                call,
                due_s=deadline.at_s,
                late=lambda: self._engine.timeout_error(deadline),
            )
        return await unless_disconnected(request, work)

    def writer(self, request: Request) -> Callable[[Callable[[], T]], Awaitable[T]]:
        """What runs calls that write the answer to a request."""
        client = record_of(request).client

        async def write(call: Callable[[], T]) -> T:
            return await self._writers.run(client, call)

        return write

    def close(self) -> None:
        """End whatever waits with EngineNotReadyError; waits for no thread."""
        for workers in (self._small, self._large, self._guarded, self._writers):
            workers.close()
