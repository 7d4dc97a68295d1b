"""Deadline: the time by which a request must be complete."""

import time
from dataclasses import dataclass

from nanovllm.errors import RequestTimeoutError, counted


@dataclass(slots=True, eq=False)
class Deadline:
    """The time by which a request must be complete.

    Attributes:
        timeout_s: seconds after the arrival of the request.
        at_s: the same as a time of `time.monotonic()`.
        has_begun: whether the engine has run a step of the request.
        has_passed: whether the request exceeded the deadline.
    """

    timeout_s: float
    at_s: float
    has_begun: bool = False
    has_passed: bool = False

    @classmethod
    def after(cls, timeout_s: float, arrived_s: float | None = None) -> "Deadline":
        """Return the deadline of a request that arrived at `arrived_s`, by default now."""
        return cls(timeout_s, (time.monotonic() if arrived_s is None else arrived_s) + timeout_s)

    def error(self, *, tokens: int, retry_after_s: int) -> RequestTimeoutError:
        """Return the error of a request that exceeds its deadline after `tokens` tokens."""
        self.has_passed = True
        generated = f"{counted(tokens, 'token')} of its answer came in time"
        begun = generated if tokens else "it was being worked on"
        return RequestTimeoutError(
            f"the request was given {self.timeout_s:g} s and is not answered; "
            f"{begun if self.has_begun else 'it was still waiting for its turn'}; "
            "give it more time, or ask for less",
            has_begun=self.has_begun,
            retry_after_s=retry_after_s,
        )
