"""Admission control: what unfinished requests may hold, and when to retry after a refusal.

A request needs choices, tokens, and memory for its log-probabilities. The room for all of its
prompts is reserved before any of them is queued. The choices and tokens of a prompt are released
when it ends, for whatever reason, and the memory once the response has been written. One thread
checks and reserves without yielding in between, so no burst exceeds a limit. Each limit is shared
between clients as shares.py says.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanovllm.engine.metrics import AdmissionStats
from nanovllm.errors import InvalidRequestError, QueueFullError, counted, setting
from nanovllm.shares import Shares

MAX_QUEUED_REQUESTS = 1024
QUEUED_CACHES = 16
"""Default maximum of unfinished tokens, as a multiple of the KV cache's capacity."""
MAX_LOGPROBS_BYTES = 256 << 20
MIN_RETRY_S, MAX_RETRY_S = 1, 60
MEMORY_RETRY_S = 5
_WINDOW_S = 30.0
"""Period over which the rate of releases is measured."""


class RequestSize(NamedTuple):
    """What a request, or one of its prompts, may need at most.

    Attributes:
        choices: choices of all prompts.
        tokens: tokens of prompts and outputs together.
        logprobs_bytes: memory for log-probabilities.
    """

    choices: int = 0
    tokens: int = 0
    logprobs_bytes: int = 0


def total_size(sizes: Sequence[RequestSize]) -> RequestSize:
    """Return the sum of several sizes."""
    return RequestSize(*map(sum, zip(*sizes, strict=True))) if sizes else RequestSize()


def check_choices(count: int, limit: int) -> None:
    """Raise InvalidRequestError if a request has more choices than the limit."""
    if count > limit:
        raise InvalidRequestError(
            f"the request asks for {count} choices at once, the limit is {limit} "
            "(max_queued_requests); send fewer prompts or a smaller n or best_of"
        )


class Reservation:
    """A client's room for the prompts of one request."""

    __slots__ = ("_admission", "_held", "_logprobs_bytes", "client")

    def __init__(self, admission: "Admission", client: str, sizes: Sequence[RequestSize]) -> None:
        """Hold `sizes`, one for each prompt; only `Admission.reserve` calls this."""
        self._admission = admission
        self._held = dict(enumerate(sizes))
        self._logprobs_bytes = total_size(sizes).logprobs_bytes
        self.client = client

    @property
    def unfinished(self) -> RequestSize:
        """What the prompts that have not ended may need."""
        return total_size(list(self._held.values()))

    def release_prompt(self, index: int) -> None:
        """Release the choices and tokens of one prompt. A second call has no effect."""
        size = self._held.pop(index, None)
        if size is not None:
            self._admission.add_released(self.client, size)

    def release(self) -> None:
        """Release everything. A second call has no effect."""
        for index in list(self._held):
            self.release_prompt(index)
        num_bytes, self._logprobs_bytes = self._logprobs_bytes, 0
        self._admission.logprobs_bytes.release(self.client, num_bytes)


class Admission:
    """Counts what unfinished requests hold against three limits. For use by one thread.

    Attributes:
        choices, tokens, logprobs_bytes: the shares of all clients. Tokens have no limit until the
            size of the KV cache is known.
    """

    def __init__(
        self,
        max_choices: int,
        max_tokens: int | None = None,
        max_logprobs_bytes: int = MAX_LOGPROBS_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with nothing reserved. A limit is what one client may hold."""
        self.max_choices = max_choices
        self.choices = Shares(max_choices)
        self.tokens = Shares(max_tokens)
        self.logprobs_bytes = Shares(max_logprobs_bytes)
        self._refused = {"requests": 0, "tokens": 0, "memory": 0}
        self._clock = clock
        self._busy_since_s = clock()
        # (time, choices, tokens): each entry is the sum of the releases within one second.
        self._released: deque[tuple[float, int, int]] = deque()

    def stats(self) -> AdmissionStats:
        """Return the reserved amounts, the limits and the numbers of refusals."""
        return AdmissionStats(
            self.choices.total,
            self.tokens.total,
            self.max_choices,
            self.tokens.limit,
            dict(self._refused),
        )

    def check(self, size: RequestSize, *, client: str = "") -> None:
        """Check whether `client` can reserve `size` now.

        Raises:
            InvalidRequestError: it exceeds a limit by itself.
            QueueFullError: there is no room now; `retry_after_s` says when to retry.
        """
        self._check_limits(size)
        choices = self.choices.missing(client, size.choices)
        tokens = self.tokens.missing(client, size.tokens)
        if choices:
            kind = "requests"
            reason = (
                f"{counted(self.choices.total, 'unfinished request')} and {size.choices} more "
                f"would pass {self.choices.described(client)} (max_queued_requests)"
            )
        elif tokens:
            kind = "tokens"
            reason = (
                f"unfinished requests may need {self.tokens.total} tokens and {size.tokens} more "
                f"would pass {self.tokens.described(client)} (max_queued_tokens)"
            )
        elif self.logprobs_bytes.missing(client, size.logprobs_bytes):
            kind = "memory"
            reason = (
                f"log-probabilities of unfinished requests may need {self.logprobs_bytes.total} "
                f"bytes and {size.logprobs_bytes} more would pass "
                f"{self.logprobs_bytes.described(client)} (max_queued_logprobs_memory)"
            )
        else:
            return
        self._refused[kind] += 1
        wait_s = MEMORY_RETRY_S if kind == "memory" else self.retry_after_s(choices, tokens)
        raise QueueFullError(f"{reason}; try again in {wait_s} s", retry_after_s=wait_s)

    def _check_limits(self, size: RequestSize) -> None:
        """Raise InvalidRequestError if a request exceeds a limit by itself."""
        check_choices(size.choices, self.max_choices)
        if self.tokens.limit is not None and size.tokens > self.tokens.limit:
            raise InvalidRequestError(
                f"the request may need {size.tokens} tokens, prompts and the "
                f"{setting('max_tokens')} of {size.choices} choices together, the limit is "
                f"{self.tokens.limit}; lower {setting('max_tokens')}, n or best_of, or send fewer "
                "prompts at once"
            )
        max_bytes = self.logprobs_bytes.limit
        if max_bytes is not None and size.logprobs_bytes > max_bytes:
            raise InvalidRequestError(
                f"the request's log-probabilities may need {size.logprobs_bytes} bytes, the limit "
                f"is {max_bytes} (max_queued_logprobs_memory); ask for fewer of them, or send "
                "fewer prompts at once",
                param="logprobs",
            )

    def reserve(self, sizes: Sequence[RequestSize], *, client: str = "") -> Reservation:
        """Reserve room for all prompts of a request, or for none; raises as `check`."""
        size = total_size(sizes)
        self.check(size, client=client)
        if self.choices.total == 0:  # measure the rate of releases only while the server is busy
            self._busy_since_s = self._clock()
            self._released.clear()
        self.choices.take(client, size.choices)
        self.tokens.take(client, size.tokens)
        self.logprobs_bytes.take(client, size.logprobs_bytes)
        return Reservation(self, client, sizes)

    def add_released(self, client: str, size: RequestSize) -> None:
        """Subtract the choices and tokens of a prompt that has ended, for `Reservation`."""
        self.choices.release(client, size.choices)
        self.tokens.release(client, size.tokens)
        now = self._clock()
        if self._released and now - self._released[-1][0] < 1:
            time_s, choices, tokens = self._released.pop()
            self._released.append((time_s, choices + size.choices, tokens + size.tokens))
        else:
            self._released.append((now, size.choices, size.tokens))
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
