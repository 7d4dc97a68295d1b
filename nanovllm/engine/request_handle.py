"""RequestHandle: a request in the engine, as seen by the asyncio task that waits for it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from typing_extensions import Self

from nanovllm.deadlines import Deadline
from nanovllm.engine.admission import Reservation
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.errors import NanovllmError
from nanovllm.outputs import RequestOutput


@dataclass(slots=True, eq=False)
class RequestHandle:
    """The prompts of one request, for the task that waits for their outputs.

    Use it in a `with` statement, or call `release`. Both abort unfinished prompts.

    Attributes:
        prompts: the prompts.
        reservation: the request's room; None if the caller holds it.
        remove: removes a prompt from the engine.
        deadline, timer: deadline of the request and its timer; None without a deadline.
        error: the exception for unfinished prompts, if there are no more outputs.
    """

    prompts: Sequence[PromptRequest]
    reservation: Reservation | None
    remove: Callable[[PromptRequest], None]
    deadline: Deadline | None = None
    timer: asyncio.TimerHandle | None = None
    error: NanovllmError | None = None
    _held: dict[PromptRequest, int] = field(init=False)
    _updated: set[int] = field(init=False, default_factory=set)
    _wakeup: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._held = {prompt: index for index, prompt in enumerate(self.prompts)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_finished(self) -> bool:
        """Whether every prompt has ended."""
        return all(prompt.is_finished for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens that were generated so far for all prompts."""
        return sum(prompt.num_output_tokens for prompt in self.prompts)

    async def wait_for_update(self) -> None:
        """Wait for the first update, which an invalid grammar ends; raises the error then."""
        while not self._updated:
            await self._wait_for_any()
        for index in sorted(self._updated):
            self._raise_error(index)

    async def wait(self) -> None:
        """Wait until every prompt has ended. Raises the first error."""
        async for _ in self._updates():
            pass

    async def deltas(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Yield (index of a prompt, its delta); raises the first error.

        Updates that arrive while the caller is busy merge into one delta.
        """
        async with aclosing(self._updates()) as updates:
            async for index in updates:
                delta = self.prompts[index].take_delta()
                if delta is not None:
                    yield index, delta

    async def _updates(self) -> AsyncGenerator[int, None]:
        """Yield the indices of prompts that have updates, and end those that are finished."""
        while self._held:
            await self._wait_for_any()
            updated = sorted(self._updated)
            self._updated.clear()
            for index in updated:
                is_finished = self.prompts[index].is_finished
                self._raise_error(index)
                yield index
                if is_finished:
                    self.end(index)
        if self.error is not None and not self.is_finished:
            raise self.error  # it came after the last update, and has released all prompts

    async def _wait_for_any(self) -> None:
        """Wait for an update; raises `error` where none comes."""
        if not self._updated and self.error is None:
            await self._wakeup.wait()
            self._wakeup.clear()
        if not self._updated and self.error is not None:
            raise self.error

    def _raise_error(self, index: int) -> None:
        prompt = self.prompts[index]
        if prompt.error is not None:
            raise prompt.error
        if self.error is not None and not prompt.is_finished:
            raise self.error

    def notify(self, prompt: PromptRequest) -> None:
        """Wake the task, because this prompt has an update."""
        if prompt.error is not None:
            self.fail(prompt.error)
        index = self._held.get(prompt)
        if index is not None:
            self._updated.add(index)
            self._wakeup.set()

    def fail(self, error: NanovllmError) -> None:
        """Wake the task, which raises `error` for unfinished prompts, unless all are complete."""
        if self.error is None and not self.is_finished:
            self.error = error
            self._wakeup.set()

    @property
    def unfinished(self) -> list[int]:
        """Indices of the prompts that are neither released nor complete."""
        return [index for prompt, index in self._held.items() if not prompt.is_finished]

    def end(self, index: int) -> None:
        """Abort a prompt if it is unfinished, and release its choices and tokens.

        Ending the last prompt cancels the timer.
        """
        self._held.pop(self.prompts[index], None)
        self.remove(self.prompts[index])
        if self.reservation is not None:
            self.reservation.release_prompt(index)
        if self.timer is not None and not self._held:
            self.timer.cancel()

    def release(self) -> None:
        """Abort unfinished prompts, and release everything that the request holds.

        Call it once the response is written. A second call has no effect.
        """
        for index in list(self._held.values()):
            self.end(index)
        if self.reservation is not None:
            self.reservation.release()
