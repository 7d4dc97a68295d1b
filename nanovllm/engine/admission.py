"""Admission control: limits on unfinished choices and tokens, and when to retry after a refusal.

The room for all prompts of a request is reserved before any of them is queued. Each prompt releases
its reservation once, for whatever reason it ends. One thread checks and reserves without yielding
in between, so no burst exceeds a limit. Each limit is shared between clients as shares.py says.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanovllm.engine.metrics import AdmissionStats
from nanovllm.engine.shares import Shares
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
    """A client's reservation of `choices` choices and `tokens` tokens, until it is released."""

    __slots__ = ("_admission", "choices", "client", "tokens")

    def __init__(self, admission: "Admission", client: str, choices: int, tokens: int) -> None:
        """Create a reservation; only `Admission.reserve` calls this."""
        self._admission: Admission | None = admission
        self.client = client
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
        self._choices = Shares(max_choices)
        self._tokens = Shares(max_tokens)
        self.max_choices = max_choices
        self._refused = {"requests": 0, "tokens": 0}
        self._clock = clock
        self._busy_since_s = clock()
        # (time, choices, tokens): each entry is the sum of the releases within one second.
        self._released: deque[tuple[float, int, int]] = deque()

    @property
    def max_tokens(self) -> int | None:
        """Limit of tokens; None for no limit."""
        return self._tokens.limit

    @max_tokens.setter
    def max_tokens(self, limit: int) -> None:
        self._tokens.limit = limit

    @property
    def choices(self) -> int:
        """Reserved choices of all clients."""
        return self._choices.total

    @property
    def tokens(self) -> int:
        """Reserved tokens of all clients."""
        return self._tokens.total

    def stats(self) -> AdmissionStats:
        """Return the reserved amounts, the limits and the numbers of refusals."""
        return AdmissionStats(
            self.choices, self.tokens, self.max_choices, self.max_tokens, dict(self._refused)
        )

    def check(self, choices: int, tokens: int = 0, *, client: str = "") -> None:
        """Check whether `client` can reserve `choices` and `tokens` now.

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
        missing_choices = self._choices.missing(client, choices)
        missing_tokens = self._tokens.missing(client, tokens)
        if not missing_choices and not missing_tokens:
            return
        if missing_choices:
            reason = (
                f"{self.choices} requests are unfinished and {choices} more would pass "
                f"{self._choices.described(client)} (max_queued_requests)"
            )
        else:
            reason = (
                f"unfinished requests may need {self.tokens} tokens and {tokens} more would pass "
                f"{self._tokens.described(client)} (max_queued_tokens)"
            )
        self._refused["requests" if missing_choices else "tokens"] += 1
        wait_s = self.retry_after_s(missing_choices, missing_tokens)
        raise QueueFullError(f"{reason}; try again in {wait_s} s", retry_after_s=wait_s)

    def reserve(self, parts: Sequence[tuple[int, int]], *, client: str = "") -> list[Reservation]:
        """Reserve room for all parts, each (choices, tokens), or for none; raises as `check`."""
        choices, tokens = (
            (sum(amounts) for amounts in zip(*parts, strict=True)) if parts else (0, 0)
        )
        self.check(choices, tokens, client=client)
        if self.choices == 0:  # measure the rate of releases only while the server is busy
            self._busy_since_s = self._clock()
            self._released.clear()
        self._choices.take(client, choices)
        self._tokens.take(client, tokens)
        return [Reservation(self, client, *part) for part in parts]

    def add_released(self, reservation: Reservation) -> None:
        """Subtract a released reservation; only `Reservation.release` calls this."""
        self._choices.release(reservation.client, reservation.choices)
        self._tokens.release(reservation.client, reservation.tokens)
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


class HeldMemory:
    """A client's bytes of a MemoryBudget, until they are released."""

    __slots__ = ("_client", "_shares", "num_bytes")

    def __init__(self, shares: Shares, client: str, num_bytes: int) -> None:
        """Take the memory; only `MemoryBudget.hold` calls this."""
        self._shares: Shares | None = shares
        self._client = client
        self.num_bytes = num_bytes
        shares.take(client, num_bytes)

    def release(self) -> None:
        """Release the memory. A second call has no effect."""
        shares, self._shares = self._shares, None
        if shares is not None:
            shares.release(self._client, self.num_bytes)


class MemoryBudget:
    """Memory for log-probabilities of unwritten responses. For use by one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Start with nothing reserved."""
        self._shares = Shares(max_bytes)
        self.num_refused = 0

    def fit(self, free_bytes: int) -> None:
        """Lower the limit so that all clients together hold at most `free_bytes`."""
        self._shares.fit(free_bytes)

    @property
    def max_bytes(self) -> int:
        """What one client may hold."""
        assert self._shares.limit is not None
        return self._shares.limit

    @property
    def held_bytes(self) -> int:
        """Reserved bytes of all clients."""
        return self._shares.total

    def hold(self, num_bytes: int, *, client: str = "") -> HeldMemory:
        """Reserve `num_bytes` bytes for a client.

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
        if self._shares.missing(client, num_bytes):
            self.num_refused += 1
            raise QueueFullError(
                f"log-probabilities of unfinished requests may need {self.held_bytes} bytes and "
                f"{num_bytes} more would pass {self._shares.described(client)} "
                f"(max_queued_logprobs_memory); try again in {MEMORY_RETRY_S} s",
                retry_after_s=MEMORY_RETRY_S,
            )
        return HeldMemory(self._shares, client, num_bytes)
