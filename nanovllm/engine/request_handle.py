"""RequestHandle: a request in the engine, as seen by the asyncio task that waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from typing_extensions import Self

from nanovllm.deadlines import Deadline
from nanovllm.engine.admission import Reservation
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.errors import NanovllmError
from nanovllm.outputs import RequestOutput


@dataclass(slots=True, eq=False)
class RequestHandle:
    """The prompts of one request, for the task that waits for their outputs.

    Use it in a `with` statement, or call `release`. Both abort unfinished prompts.

    Attributes:
        prepared_requests: the prompts.
        reservations: reservation in the queue for each prompt; None if the caller holds it.
        on_release: called with the handle and the indices of the prompts that are released.
        deadline, timer: deadline of the request and its timer; None without a deadline.
        error: the exception for unfinished prompts, if there are no more outputs.
    """

    prepared_requests: Sequence[PreparedRequest]
    reservations: Sequence[Reservation | None]
    on_release: "Callable[[RequestHandle, Sequence[int]], None]"
    deadline: Deadline | None = None
    timer: asyncio.TimerHandle | None = None
    error: NanovllmError | None = None
    _held: set[int] = field(init=False)
    _updated: set[int] = field(init=False, default_factory=set)
    _wakeup: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._held = set(range(len(self.prepared_requests)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def is_finished(self) -> bool:
        """Whether every prompt has ended."""
        return all(prepared.output_processor.is_finished for prepared in self.prepared_requests)

    @property
    def unfinished(self) -> list[int]:
        """Indices of the prompts that are neither released nor complete."""
        return [
            index
            for index in sorted(self._held)
            if not self.prepared_requests[index].output_processor.is_finished
        ]

    async def wait(self) -> None:
        """Wait until every prompt has ended; release each when it ends. Raises the first error."""
        while self._held:
            for index in await self._take_updated():
                self._raise_error(index)
                if self.prepared_requests[index].output_processor.is_finished:
                    self.release([index])
        self._raise_late_error()

    async def deltas(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield (index of a prompt, its delta); raises the first error.

        Updates that arrive while the caller is busy merge into one delta.
        """
        while self._held:
            for index in await self._take_updated():
                output_processor = self.prepared_requests[index].output_processor
                is_finished = output_processor.is_finished
                self._raise_error(index)
                delta = output_processor.take_delta()
                if delta is not None:
                    yield index, delta
                if is_finished:
                    self.release([index])
        self._raise_late_error()

    async def _take_updated(self) -> list[int]:
        """Wait for updates, and return the indices of their prompts; raises `error` without any."""
        if not self._updated and self.error is None:
            await self._wakeup.wait()
            self._wakeup.clear()
        if not self._updated and self.error is not None:
            raise self.error
        updated = sorted(self._updated)
        self._updated.clear()
        return updated

    def _raise_late_error(self) -> None:
        """Raise an error that came during the last delta, and has released all prompts."""
        if self.error is not None and not self.is_finished:
            raise self.error

    def _raise_error(self, index: int) -> None:
        output_processor = self.prepared_requests[index].output_processor
        if output_processor.error is not None:
            raise output_processor.error
        if self.error is not None and not output_processor.is_finished:
            raise self.error

    def notify(self, index: int) -> None:
        """Wake the task, because this prompt has an update."""
        self._updated.add(index)
        self._wakeup.set()

    def fail(self, error: NanovllmError) -> None:
        """Wake the task, which raises `error` for unfinished prompts, unless all are complete."""
        if self.error is None and not self.is_finished:
            self.error = error
            self._wakeup.set()

    def release(self, indices: Sequence[int] | None = None) -> None:
        """Abort unfinished prompts and release the reservations, by default of every prompt.

        Releasing the last prompt cancels the timer. A second call has no effect.
        """
        indices = sorted(self._held) if indices is None else indices
        held = [index for index in indices if index in self._held]
        self.on_release(self, held)
        for index in held:
            self._held.discard(index)
            reservation = self.reservations[index]
            if reservation is not None:
                reservation.release()
        if self.timer is not None and not self._held:
            self.timer.cancel()
