"""How much may be unfinished at once, in answers and in tokens, and when somebody who is refused should come back.

Room is reserved before anything of a request is queued, for all of its parts or none, and each part gives its share back once, however
it ends. All of it happens on one thread without a pause between looking and taking, so no burst gets past a limit.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanovllm.engine.metrics import AdmissionStats
from nanovllm.errors import InvalidRequestError, QueueFullError

MAX_QUEUED_REQUESTS = 1024
QUEUED_CACHES = 16
"""Tokens that may be unfinished where nobody says how many: so many times what the KV cache holds, which is what can run at once."""
MAX_LOGPROBS_BYTES = 256 << 20
MIN_RETRY_S, MAX_RETRY_S = 1, 60
MEMORY_RETRY_S = 5
_WINDOW_S = 30.0  # how far back the rate looks at which room became free


def check_answers(asked: int, limit: int) -> None:
    """Raise InvalidRequestError where one request asks for more answers than may ever be unfinished."""
    if asked > limit:
        raise InvalidRequestError(
            f"the request asks for {asked} answers at once, the limit is {limit} (max_queued_requests); send fewer prompts or a smaller n or best_of"
        )


class Reservation:
    """Room for `answers` answers and `tokens` tokens, which is given back once."""

    __slots__ = ("_admission", "answers", "tokens")

    def __init__(self, admission: "Admission", answers: int, tokens: int) -> None:
        """Of the room of `admission`, which makes it."""
        self._admission: Admission | None = admission
        self.answers = answers
        self.tokens = tokens

    @property
    def is_held(self) -> bool:
        """Whether it has not been given back yet."""
        return self._admission is not None

    def release(self) -> None:
        """Give the room back; harmless twice."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.take_back(self)


class Admission:
    """Counts what is unfinished against two limits. For one thread."""

    def __init__(
        self,
        max_answers: int,
        max_tokens: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing reserved; `max_tokens` None where tokens do not count, or not yet. `clock` gives seconds."""
        self.max_answers = max_answers
        self.max_tokens = max_tokens
        self.answers = 0
        self.tokens = 0
        self._refused = {"requests": 0, "tokens": 0}
        self._clock = clock
        self._busy_since_s = clock()
        self._freed: deque[tuple[float, int, int]] = (
            deque()
        )  # (when, answers, tokens), what came within a second in one

    def stats(self) -> AdmissionStats:
        """What is reserved now, and how often the limits said no."""
        return AdmissionStats(
            self.answers, self.tokens, self.max_answers, self.max_tokens, dict(self._refused)
        )

    def check(self, answers: int, tokens: int = 0) -> None:
        """Whether so much could be reserved now.

        Raises:
            InvalidRequestError: it never could.
            QueueFullError: not at the moment; says when to try again.
        """
        check_answers(answers, self.max_answers)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidRequestError(
                f"the request may need {tokens} tokens, prompts and the max_tokens of {answers} answers together, the limit is {self.max_tokens}; "
                "lower max_tokens, n or best_of, or send fewer prompts at once"
            )
        if self.answers + answers > self.max_answers:
            said = f"{self.answers} requests are unfinished and {answers} more would pass the limit of {self.max_answers} (max_queued_requests)"
            raise self._refusal("requests", said, answers, tokens)
        if self.max_tokens is not None and self.tokens + tokens > self.max_tokens:
            said = (
                f"unfinished requests may need {self.tokens} tokens and {tokens} more would pass "
                f"the limit of {self.max_tokens} (max_queued_tokens)"
            )
            raise self._refusal("tokens", said, answers, tokens)

    def reserve(self, parts: Sequence[tuple[int, int]]) -> list[Reservation]:
        """Room for every part, each (answers, tokens), or for none; raises as `check`."""
        answers, tokens = (
            (sum(amounts) for amounts in zip(*parts, strict=True)) if parts else (0, 0)
        )
        self.check(answers, tokens)
        if self.answers == 0:  # the time before says nothing about how fast room becomes free
            self._busy_since_s = self._clock()
            self._freed.clear()
        self.answers += answers
        self.tokens += tokens
        return [Reservation(self, *part) for part in parts]

    def take_back(self, reservation: Reservation) -> None:
        """What a reservation does when it is given back."""
        self.answers -= reservation.answers
        self.tokens -= reservation.tokens
        now = self._clock()
        if self._freed and now - self._freed[-1][0] < 1:
            when, answers, tokens = self._freed.pop()
            self._freed.append((when, answers + reservation.answers, tokens + reservation.tokens))
        else:
            self._freed.append((now, reservation.answers, reservation.tokens))
            self._forget(now)

    def retry_after_s(self, answers: int, tokens: int) -> int:
        """Seconds until so much more room should be free, at the rate at which it became free lately; from 1 to 60.

        Where nothing has become free it takes as long again as it has been so.
        """
        now = self._clock()
        self._forget(now)
        watched_s = min(now - self._busy_since_s, _WINDOW_S)
        waits = [MIN_RETRY_S]
        for needed, place in ((answers, 1), (tokens, 2)):
            freed = sum(entry[place] for entry in self._freed)
            if needed > 0:
                waits.append(
                    math.ceil(min(needed * watched_s / freed if freed else watched_s, MAX_RETRY_S))
                )
        return max(waits)

    def _forget(self, now: float) -> None:
        while self._freed and self._freed[0][0] < now - _WINDOW_S:
            self._freed.popleft()

    def _refusal(self, reason: str, said: str, answers: int, tokens: int) -> QueueFullError:
        self._refused[reason] += 1
        missing_tokens = 0 if self.max_tokens is None else self.tokens + tokens - self.max_tokens
        wait_s = self.retry_after_s(self.answers + answers - self.max_answers, missing_tokens)
        return QueueFullError(f"{said}; try again in {wait_s} s", retry_after_s=wait_s)


class HeldMemory:
    """Part of a MemoryBudget, which is given back once."""

    __slots__ = ("_budget", "num_bytes")

    def __init__(self, budget: "MemoryBudget", num_bytes: int) -> None:
        """Of `budget`, which makes it."""
        self._budget: MemoryBudget | None = budget
        self.num_bytes = num_bytes

    def release(self) -> None:
        """Give it back; harmless twice."""
        budget, self._budget = self._budget, None
        if budget is not None:
            budget.held_bytes -= self.num_bytes


class MemoryBudget:
    """Memory for the log-probabilities of answers that are not written yet. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        """Nothing held."""
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.num_refused = 0

    def hold(self, num_bytes: int) -> HeldMemory:
        """So many bytes, until they are given back.

        Raises:
            InvalidRequestError: there are never so many.
            QueueFullError: not at the moment.
        """
        if num_bytes > self.max_bytes:
            raise InvalidRequestError(
                f"the request's log-probabilities may need {num_bytes} bytes, the limit is {self.max_bytes} (max_queued_logprobs_memory); "
                "ask for fewer of them, or send fewer prompts at once",
                param="logprobs",
            )
        if self.held_bytes + num_bytes > self.max_bytes:
            self.num_refused += 1
            raise QueueFullError(
                f"log-probabilities of unfinished requests may need {self.held_bytes} bytes and {num_bytes} more would pass the limit of "
                f"{self.max_bytes} (max_queued_logprobs_memory); try again in {MEMORY_RETRY_S} s",
                retry_after_s=MEMORY_RETRY_S,
            )
        self.held_bytes += num_bytes
        return HeldMemory(self, num_bytes)
