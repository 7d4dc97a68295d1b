"""What waits for an answer on the event loop: a reader for each prompt of a request."""

import asyncio
from dataclasses import dataclass, field

from nanovllm.engine.admission import Reservation
from nanovllm.engine.assembler import Assembler
from nanovllm.engine.request import Request
from nanovllm.errors import EngineError


@dataclass(slots=True, eq=False)
class Reader:
    """The answers to one prompt, and the task that waits for their news.

    Attributes:
        reservation: the room that they take; None where that is counted elsewhere.
        has_left: the task is gone, and what it held is given back.
        gone: why no more news come.
    """

    assembler: Assembler
    requests: tuple[Request, ...]
    reservation: Reservation | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    has_left: bool = False
    gone: EngineError | None = None

    def give_up(self, reason: EngineError) -> None:
        """Wake the task: it gets `reason` instead of news."""
        self.gone = reason
        self.news.set()

    def leave(self) -> None:
        """Give back what it holds."""
        self.has_left = True
        if self.reservation is not None:
            self.reservation.release()
