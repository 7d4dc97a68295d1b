"""Threads for work that would hold up the event loop: a bounded number, shared out fairly among clients.

`asyncio.to_thread` uses one queue for everybody, cannot take back what is queued, and its threads are joined when the program ends,
however long that takes. Here each client has a queue of its own and the clients take turns; what nobody waits for any more is removed
from its queue; the threads are daemons, so that a program can end while one is still at work.

Threads share Python's interpreter with the event loop. So what runs here must be made of short calls: a single call into C that keeps
the interpreter, such as json.loads of megabytes, stops the event loop as if it ran there.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

from nanovllm.errors import EngineFaultError, EngineNotReadyError, NanovllmError, QueueFullError

T = TypeVar("T")


class _Job:
    """A call, and the future of whoever waits for it."""

    __slots__ = ("call", "future", "loop")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def run(self) -> None:
        """Call it on this thread and hand the result over; raises nothing."""
        try:
            result, error = self.call(), None
        except BaseException as raised:  # noqa: BLE001 - it is raised where the result is waited for
            result, error = None, _as_exception(raised)
        try:
            self.loop.call_soon_threadsafe(self._finish, result, error)
        except RuntimeError:
            return  # the event loop is closed: nobody waits

    def _finish(self, result: Any, error: Exception | None) -> None:
        if error is not None:
            self.fail(error)
        elif not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """On the event loop: raise `error` where the result is waited for, if anywhere."""
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self, late: Callable[[], NanovllmError]) -> None:
        """On the event loop: nobody waits any longer; without a result yet, raise what `late` gives."""
        if not self.future.done():
            self.future.set_exception(late())


def _as_exception(raised: BaseException) -> Exception:
    """What may be raised on the event loop: panics of Rust libraries are no Exception, and would pass by all that answers errors."""
    if isinstance(raised, Exception):
        return raised
    error = EngineFaultError("the server failed; its log has the reason")
    error.__cause__ = raised
    return error


class FairWorkers:
    """A few threads that carry out calls, one client after the other. Use it from one event loop."""

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        """Start no thread before there is work; refuse a call by QueueFullError where `max_waiting` wait already."""
        self._name = name
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()
        self._running: set[_Job] = set()
        self._changed = threading.Condition()
        self._num_started = 0
        self._num_waiting = 0
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Calls that no thread has begun."""
        return self._num_waiting

    async def run(
        self,
        client: str,
        call: Callable[[], T],
        *,
        due_s: float | None = None,
        late: Callable[[], NanovllmError] | None = None,
    ) -> T:
        """The result of `call`, made on one of the threads when it is this client's turn.

        Cancelling the task removes the call from the queue; one that has begun goes on, and its result is dropped.

        Args:
            due_s: time on the clock of the event loop after which nobody waits for the result.
            late: what to raise then.

        Raises:
            QueueFullError: too many calls wait.
            EngineNotReadyError: the threads have been closed.
        """
        job = _Job(call)
        self._put(client, job)
        timer = None
        if due_s is not None and late is not None:
            timer = job.loop.call_at(due_s, job.expire, late)
        try:
            result: T = await job.future
            return result
        finally:
            self._remove(client, job)
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Refuse what waits and what comes by EngineNotReadyError, also to those whose call has begun; waits for no thread."""
        with self._changed:
            self._is_closed = True
            jobs = [*self._running, *(job for queue in self._queues.values() for job in queue)]
            self._queues.clear()
            self._num_waiting = 0
            self._changed.notify_all()
        for job in jobs:
            job.fail(EngineNotReadyError("the server is stopping"))

    def _put(self, client: str, job: _Job) -> None:
        with self._changed:
            if self._is_closed:
                raise EngineNotReadyError("the server is stopping")
            if self._num_waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{self._num_waiting} requests wait to be read, the limit; try again in 1 s"
                )
            self._queues.setdefault(client, deque()).append(job)
            self._num_waiting += 1
            if self._num_started < self._num_threads:
                self._num_started += 1
                threading.Thread(
                    target=self._work, name=f"{self._name}-{self._num_started}", daemon=True
                ).start()
            self._changed.notify()

    def _remove(self, client: str, job: _Job) -> None:
        """Take a job out of its queue, if it is still there."""
        with self._changed:
            queue = self._queues.get(client)
            if queue is not None and job in queue:
                queue.remove(job)
                self._num_waiting -= 1
                if not queue:
                    del self._queues[client]

    def _work(self) -> None:
        """A thread: carry out jobs until closed."""
        while (job := self._take()) is not None:
            job.run()
            with self._changed:
                self._running.discard(job)

    def _take(self) -> _Job | None:
        """The first job of the client whose turn it is, whose next turn comes after all others; None where closed."""
        with self._changed:
            while not self._queues and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            client, queue = self._queues.popitem(last=False)
            job = queue.popleft()
            if queue:
                self._queues[client] = queue
            self._num_waiting -= 1
            self._running.add(job)
            return job
