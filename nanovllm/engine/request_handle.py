"""What waits for an answer on the event loop: a handle for each prompt of a request, and what the parts of a request have in common."""

import asyncio
import time
from dataclasses import dataclass, field

from nanovllm.engine.admission import Reservation
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduling.request import Request
from nanovllm.errors import NanovllmError, RequestTimeoutError


@dataclass(slots=True, eq=False)
class Deadline:
    """When the answer to a request is due: `timeout_s` after its arrival, which is `at_s` on the clock of `time.monotonic()`.

    Attributes:
        has_begun: the engine has been at work on the request.
        has_passed: it was not answered in time.
    """

    timeout_s: float
    at_s: float
    has_begun: bool = False
    has_passed: bool = False

    @classmethod
    def after(cls, timeout_s: float, arrived_s: float | None = None) -> "Deadline":
        """Of a request that arrived at `arrived_s`, now unless given."""
        return cls(timeout_s, (time.monotonic() if arrived_s is None else arrived_s) + timeout_s)

    def error(self, *, tokens: int, retry_after_s: int) -> RequestTimeoutError:
        """What the client is told once it has passed."""
        self.has_passed = True
        where = (
            f"{tokens} tokens of its answer were generated" if tokens else "it was being worked on"
        )
        return RequestTimeoutError(
            f"the request was given {self.timeout_s:g} s and is not answered; "
            f"{where if self.has_begun else 'it was still waiting for its turn'}; give it more time, or ask for less",
            has_begun=self.has_begun,
            retry_after_s=retry_after_s,
        )


@dataclass(slots=True, eq=False)
class RequestHandle:
    """The answers to one prompt, and the task that waits for their news.

    Attributes:
        reservation: the room that they take; None where that is counted elsewhere.
        siblings: the handles of the whole request, itself among them.
        deadline, timer: theirs, where they have one.
        has_left: the task is gone, and what it held is given back.
        gone: why no more news come.
    """

    output_processor: OutputProcessor
    requests: tuple[Request, ...]
    reservation: Reservation | None = None
    siblings: "tuple[RequestHandle, ...]" = ()
    deadline: Deadline | None = None
    timer: asyncio.TimerHandle | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    has_left: bool = False
    gone: NanovllmError | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the answer is complete, or it is known why there will be none."""
        return self.gone is not None or self.output_processor.is_finished

    def fail(self, reason: NanovllmError) -> None:
        """Wake the task: it gets `reason` instead of news. An answer that is complete stays as it is."""
        if not self.is_settled:
            self.gone = reason
            self.news.set()

    def leave(self) -> None:
        """Give back what it holds; the last of the siblings to do so stops the clock."""
        self.has_left = True
        if self.reservation is not None:
            self.reservation.release()
        if self.timer is not None and all(sibling.has_left for sibling in self.siblings):
            self.timer.cancel()
