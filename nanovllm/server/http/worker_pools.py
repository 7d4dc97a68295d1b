"""Thread pools for request work that would block the event loop, shared fairly among clients.

Reading and checking bodies, tokenizing and writing large responses run here. Small requests have
threads of their own, so that they do not wait for large ones. So have requests that wait for a
template or a grammar, which other processes work on under time limits.

`asyncio.to_thread` has one queue for everybody, cannot withdraw queued calls, and its threads are
joined when the program ends. Here each client has a queue and clients take turns, cancelled calls
leave their queue, and the threads are daemons.

The threads share the GIL with the event loop. A call here must therefore be made of short steps:
one long call into C, such as json.loads of megabytes, stops the event loop too.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from nanovllm.deadlines import Deadline
from nanovllm.errors import EngineFaultError, EngineNotReadyError, NanovllmError, QueueFullError
from nanovllm.server.http.clients import client_of
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.event_stream import unless_disconnected
from nanovllm.shares import FairQueue

T = TypeVar("T")
SMALL_BYTES = 1 << 15
"""Largest body that counts as small: reading and tokenizing it takes a few milliseconds."""
MAX_WAITING = 1024
MAX_WAITING_LARGE = 64  # each keeps its body until it is read
MAX_WAITING_INSPECTIONS = 4  # each may take half a minute
_POOLS = {
    "small": (2, MAX_WAITING),
    "large": (2, MAX_WAITING_LARGE),
    "process": (4, MAX_WAITING),
    "writer": (2, MAX_WAITING),
    "inspection": (1, MAX_WAITING_INSPECTIONS),
}
"""The number of threads of each pool, and the maximum number of calls that wait for them."""


class WorkerPools:
    """The thread pools of one server."""

    def __init__(self, timeout_error: Callable[[Deadline], NanovllmError]) -> None:
        """Create the pools; no thread starts yet.

        `timeout_error` returns the error of a request that exceeds its deadline in a queue.
        """
        self._timeout_error = timeout_error
        self._pools = {
            name: FairThreadPool(f"nanovllm-{name}", num_threads, max_waiting)
            for name, (num_threads, max_waiting) in _POOLS.items()
        }

    async def read(
        self, request: Request, num_bytes: int, call: Callable[[], T], *, uses_process: bool = False
    ) -> T:
        """Return the result of a call that reads, checks or tokenizes a body of `num_bytes`.

        Args:
            uses_process: the call waits for another process, which has limits of its own.

        Raises:
            ClientDisconnectedError: the client closed its connection.
            RequestTimeoutError: the request's deadline has passed.
            QueueFullError: too many requests wait to be read.
        """
        size = "small" if num_bytes <= SMALL_BYTES else "large"
        return await self._run("process" if uses_process else size, request, call)

    async def inspect(self, request: Request, call: Callable[[], T]) -> T:
        """Return the result of a call to the inspection worker; raises as `read`."""
        return await self._run("inspection", request, call)

    async def _run(self, name: str, request: Request, call: Callable[[], T]) -> T:
        pool, client, deadline = self._pools[name], client_of(request).name, deadline_of(request)
        if deadline is None:
            return await unless_disconnected(request, pool.run(client, call))
        late = partial(self._timeout_error, deadline)
        return await unless_disconnected(request, pool.run(client, call, deadline.at_s, late))

    def writer(self, request: Request) -> Callable[[Callable[[], T]], Awaitable[T]]:
        """Return a coroutine function that runs calls that write a request's response."""
        return partial(self.write, client_of(request).name)

    async def write(self, client: str, call: Callable[[], T]) -> T:
        """Return the result of a call that writes a response, in the queue of `client`."""
        return await self._pools["writer"].run(client, call)

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs a call, which goes on after `close`."""
        return any(pool.is_busy for pool in self._pools.values())

    def close(self) -> None:
        """Close all pools; waits for no thread."""
        for pool in self._pools.values():
            pool.close()


class _Job:
    """A call and the future of its result.

    The traceback of an error refers to the thread's frames, these to the job, and the future to the
    error. A job therefore forgets both once it has ended: a cycle would keep the body until the
    garbage collector runs.
    """

    __slots__ = ("call", "future", "loop")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] | None = self.loop.create_future()

    def run(self) -> None:
        """Run the call on this thread and set the future; raises nothing."""
        try:
            result, error = self.call(), None
        except BaseException as raised:  # noqa: BLE001 - raised again by the future
            result, error = None, _as_exception(raised)
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.end, result, error)
        del result, error, self.call

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        """Set the future, on the event loop, unless it is done."""
        future, self.future = self.future, None
        if future is not None and not future.done():
            future.set_result(result) if error is None else future.set_exception(error)


def _as_exception(raised: BaseException) -> Exception:
    """Return an Exception: panics of Rust libraries are none, and no error handler takes them."""
    if isinstance(raised, Exception):
        return raised
    error = EngineFaultError("the server failed; its log has the reason")
    error.__cause__ = raised
    return error


class FairThreadPool:
    """A bounded thread pool with a queue for each client, served in turns.

    Use it from one event loop.
    """

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        """Start no thread before the first call; at most `max_waiting` calls wait.

        One more is refused, or displaces the newest call of the client with most.
        """
        self._name = name
        self._num_threads = num_threads
        self._waiting: FairQueue[_Job] = FairQueue(max_waiting)
        self._running: set[_Job] = set()
        self._changed = threading.Condition()
        self._num_started = 0
        self._is_closed = False

    async def run(
        self,
        client: str,
        call: Callable[[], T],
        deadline_s: float | None = None,
        timeout_error: Callable[[], Exception] = TimeoutError,
    ) -> T:
        """Return the result of `call`, run when it is this client's turn.

        Cancelling the task removes a waiting call; the result of a running one is dropped.

        Args:
            deadline_s: when to give up, on the event loop's clock, with `timeout_error`.

        Raises:
            QueueFullError: too many calls wait, most of them this client's.
            EngineNotReadyError: the pool is closed.
        """
        job = _Job(call)
        future = job.future
        assert future is not None
        self._put(client, job)
        try:
            timeout_s = None if deadline_s is None else deadline_s - job.loop.time()
            await asyncio.wait({future}, timeout=timeout_s)
            if not future.done():
                raise timeout_error()
            result: T = future.result()
            return result
        finally:
            self._remove(client, job)
            future.cancel()
            del future  # whose error's traceback has this frame

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs a call."""
        return bool(self._running)

    def close(self) -> None:
        """Fail all waiting, running and later calls with EngineNotReadyError.

        Does not wait for the threads.
        """
        with self._changed:
            self._is_closed = True
            jobs = [*self._running, *self._waiting.clear()]
            self._changed.notify_all()
        for job in jobs:
            job.end(error=EngineNotReadyError("the server is stopping"))

    def _put(self, client: str, job: _Job) -> None:
        """Queue a job; fail the job that has no place, which may be another client's."""
        with self._changed:
            if self._is_closed:
                raise EngineNotReadyError("the server is stopping")
            refused = self._waiting.put(client, job)
            if self._num_started < self._num_threads:
                self._num_started += 1
                threading.Thread(
                    target=self._run_jobs, name=f"{self._name}-{self._num_started}", daemon=True
                ).start()
            self._changed.notify()
        if refused is not None:
            message = f"{len(self._waiting)} requests wait to be read, the limit; try again in 1 s"
            refused.end(error=QueueFullError(message))

    def _remove(self, client: str, job: _Job) -> None:
        """Remove a job from its queue if no thread has taken it."""
        with self._changed:
            self._waiting.remove(client, job)

    def _run_jobs(self) -> None:
        """Run jobs until the pool is closed; the main function of its threads."""
        while (job := self._take()) is not None:
            job.run()
            with self._changed:
                self._running.discard(job)

    def _take(self) -> _Job | None:
        """Return the next client's first job and move the client last; None once closed."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            job = self._waiting.take()
            self._running.add(job)
            return job
