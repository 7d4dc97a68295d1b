"""Admission control: limits on unfinished choices and tokens, and when to retry after a refusal.

The room for all prompts of a request is reserved before any of them is queued. Each prompt releases
its reservation once, for whatever reason it ends. One thread checks and reserves without yielding
in between, so no burst exceeds a limit.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanovllm.engine.metrics import AdmissionStats
from nanovllm.errors import InvalidRequestError, QueueFullError

MAX_QUEUED_REQUESTS = 1024
QUEUED_CACHES = 16
"""Default maximum of unfinished tokens, as a multiple of the KV cache's capacity."""
MAX_LOGPROBS_BYTES = 256 << 20
MIN_RETRY_S, MAX_RETRY_S = 1, 60
MEMORY_RETRY_S = 5
_WINDOW_S = 30.0
"""Period over which the rate of releases is measured."""


def check_choices(count: int, limit: int) -> None:
    """Raise InvalidRequestError if a request has more choices than the limit."""
    if count > limit:
        raise InvalidRequestError(
            f"the request asks for {count} choices at once, the limit is {limit} "
            "(max_queued_requests); send fewer prompts or a smaller n or best_of"
        )


class Reservation:
    """A reservation of `choices` choices and `tokens` tokens, until it is released."""

    __slots__ = ("_admission", "choices", "tokens")

    def __init__(self, admission: "Admission", choices: int, tokens: int) -> None:
        """Create a reservation; only `Admission.reserve` calls this."""
        self._admission: Admission | None = admission
        self.choices = choices
        self.tokens = tokens

    def release(self) -> None:
        """Release the reservation. A second call has no effect."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.add_released(self)


class Admission:
    """Counts unfinished choices and tokens against two limits. For use by one thread."""

    def __init__(
        self,
        max_choices: int,
        max_tokens: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing reserved. `max_tokens` None means no limit; it may be set later."""
        self.max_choices = max_choices
        self.max_tokens = max_tokens
        self.choices = 0
        self.tokens = 0
        self._refused = {"requests": 0, "tokens": 0}
        self._clock = clock
        self._busy_since_s = clock()
        # (time, choices, tokens): each entry is the sum of the releases within one second.
        self._released: deque[tuple[float, int, int]] = deque()

    def stats(self) -> AdmissionStats:
        """Return the reserved amounts, the limits and the numbers of refusals."""
        return AdmissionStats(
            self.choices, self.tokens, self.max_choices, self.max_tokens, dict(self._refused)
        )

    def check(self, choices: int, tokens: int = 0) -> None:
        """Check whether `choices` and `tokens` can be reserved now.

        Raises:
            InvalidRequestError: they exceed a limit by themselves.
            QueueFullError: there is no room now; `retry_after_s` says when to retry.
        """
        check_choices(choices, self.max_choices)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidRequestError(
                f"the request may need {tokens} tokens, prompts and the max_tokens of {choices} "
                f"choices together, the limit is {self.max_tokens}; lower max_tokens, n or "
                "best_of, or send fewer prompts at once"
            )
        if self.choices + choices > self.max_choices:
            reason = (
                f"{self.choices} requests are unfinished and {choices} more would pass the limit "
                f"of {self.max_choices} (max_queued_requests)"
            )
            raise self._refusal("requests", reason, choices, tokens)
        if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
            reason = (
                f"unfinished requests may need {self.tokens} tokens and {tokens} more would pass "
                f"the limit of {self.max_tokens} (max_queued_tokens)"
            )
            raise self._refusal("tokens", reason, choices, tokens)

    def reserve(self, parts: Sequence[tuple[int, int]]) -> list[Reservation]:
        """Reserve room for all parts, each (choices, tokens), or for none; raises as `check`."""
        choices, tokens = (
            (sum(amounts) for amounts in zip(*parts, strict=True)) if parts else (0, 0)
        )
        self.check(choices, tokens)
        if self.choices == 0:  # measure the rate of releases only while the server is busy
            self._busy_since_s = self._clock()
            self._released.clear()
        self.choices += choices
        self.tokens += tokens
        return [Reservation(self, *part) for part in parts]

    def add_released(self, reservation: Reservation) -> None:
        """Subtract a released reservation; only `Reservation.release` calls this."""
        self.choices -= reservation.choices
        self.tokens -= reservation.tokens
        now = self._clock()
        if self._released and now - self._released[-1][0] < 1:
            time_s, choices, tokens = self._released.pop()
            self._released.append(
                (time_s, choices + reservation.choices, tokens + reservation.tokens)
            )
        else:
            self._released.append((now, reservation.choices, reservation.tokens))
            self._drop_old_releases(now)

    def retry_after_s(self, choices: int, tokens: int) -> int:
        """Estimate the seconds, 1 to 60, until this room is released at the recent rate.

        If nothing was released recently, the estimate is the time since which that is the case.
        """
        now = self._clock()
        self._drop_old_releases(now)
        period_s = min(now - self._busy_since_s, _WINDOW_S)
        waits = [MIN_RETRY_S]
        for needed, column in ((choices, 1), (tokens, 2)):
            released = sum(entry[column] for entry in self._released)
            if needed > 0:
                wait_s = needed * period_s / released if released else period_s
                waits.append(math.ceil(min(wait_s, MAX_RETRY_S)))
        return max(waits)

    def _drop_old_releases(self, now: float) -> None:
        while self._released and self._released[0][0] < now - _WINDOW_S:
            self._released.popleft()

    def _refusal(self, limit: str, reason: str, choices: int, tokens: int) -> QueueFullError:
        self._refused[limit] += 1
        missing_tokens = 0 if self.max_tokens is None else self.tokens + tokens - self.max_tokens
        wait_s = self.retry_after_s(self.choices + choices - self.max_choices, missing_tokens)
        return QueueFullError(f"{reason}; try again in {wait_s} s", retry_after_s=wait_s)


class HeldMemory:
    """Reserved bytes of a MemoryBudget, until they are released."""

    __slots__ = ("_budget", "num_bytes")

    def __init__(self, budget: "MemoryBudget", num_bytes: int) -> None:
        """Create a reservation of memory; only `MemoryBudget.hold` calls this."""
        self._budget: MemoryBudget | None = budget
        self.num_bytes = num_bytes

    def release(self) -> None:
        """Release the memory. A second call has no effect."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.held_bytes -= self.num_bytes


class MemoryBudget:
    """Memory for log-probabilities of unwritten responses. For use by one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Start with nothing reserved."""
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.num_refused = 0

    def hold(self, num_bytes: int) -> HeldMemory:
        """Reserve `num_bytes` bytes.

        Raises:
            InvalidRequestError: they exceed the budget by themselves.
            QueueFullError: they are not free now.
        """
        if num_bytes > self.max_bytes:
            raise InvalidRequestError(
                f"the request's log-probabilities may need {num_bytes} bytes, the limit is "
                f"{self.max_bytes} (max_queued_logprobs_memory); ask for fewer of them, or send "
                "fewer prompts at once",
                param="logprobs",
            )
        if self.held_bytes + num_bytes > self.max_bytes:
            self.num_refused += 1
            raise QueueFullError(
                f"log-probabilities of unfinished requests may need {self.held_bytes} bytes and "
                f"{num_bytes} more would pass the limit of {self.max_bytes} "
                f"(max_queued_logprobs_memory); try again in {MEMORY_RETRY_S} s",
                retry_after_s=MEMORY_RETRY_S,
            )
        self.held_bytes += num_bytes
        return HeldMemory(self, num_bytes)
