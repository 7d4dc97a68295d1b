"""What the engine counts, as plain numbers; the server turns them into Prometheus metrics.

Times are seconds of `time.monotonic()`, taken by the engine's thread between steps.
"""

from dataclasses import dataclass, field

from nanovllm.outputs import RequestMetrics


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment, for other threads than its own.

    Counters only grow; prefix cache queries and hits are in tokens.
    """

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """What unfinished requests have reserved, of how much, and how often which limit refused one; `max_tokens` is None where they do not count."""

    answers: int
    tokens: int
    max_answers: int
    max_tokens: int | None
    refused: dict[str, int]


@dataclass(slots=True)
class RequestTimes:
    """When things happened to one sequence, as the engine's thread notes it."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    _summary: RequestMetrics | None = None

    def summary(self, finished_s: float | None = None) -> RequestMetrics:
        """The part that is reported with the answer; the same object until something changes."""
        found = self._summary
        if (
            found is None
            or found.first_token_s != self.first_token_s
            or found.first_scheduled_s != self.first_scheduled_s
            or found.finished_s != finished_s
        ):
            found = self._summary = RequestMetrics(
                self.arrival_s, self.first_scheduled_s, self.first_token_s, finished_s
            )
        return found


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One sequence that ended: what the per-request histograms need.

    Its tokens are those that the caller gets, and `times.finished_s` is set.
    """

    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    times: RequestMetrics


@dataclass(slots=True)
class StepStats:
    """What one step adds to the histograms.

    The lists are filled by whoever hands the step's updates to the callers, with what they get:
    tokens that were computed after a stop string are not in them.
    """

    num_tokens: int
    num_prompt_tokens: int
    num_decode_tokens: int
    duration_s: float
    times_to_first_token_s: list[float] = field(default_factory=list)
    inter_token_latencies_s: list[float] = field(default_factory=list)
    finished: list[FinishedRequest] = field(default_factory=list)
