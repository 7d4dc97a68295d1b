"""What the engine counts, as plain numbers; the server turns them into Prometheus metrics.

Times are seconds of `time.monotonic()`, taken by the engine's thread between steps.
"""

from dataclasses import dataclass, field

from nanovllm.outputs import RequestMetrics


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment. Counters only grow; prefix cache queries and hits are in tokens."""

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
    """When things happened to one sequence."""

    arrival_s: float
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None

    def summary(self, finished_s: float | None) -> RequestMetrics:
        """The part that is reported with the answer."""
        return RequestMetrics(
            self.arrival_s, self.first_scheduled_s, self.first_token_s, finished_s
        )


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One sequence that ended: what the per-request histograms need."""

    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    times: RequestTimes
    finished_s: float


@dataclass(slots=True)
class StepStats:
    """What one step adds to the histograms."""

    num_tokens: int
    num_prompt_tokens: int
    num_decode_tokens: int
    duration_s: float
    times_to_first_token_s: list[float] = field(default_factory=list)
    inter_token_latencies_s: list[float] = field(default_factory=list)
    finished: list[FinishedRequest] = field(default_factory=list)
