"""What the engine counts, as plain numbers; the server turns them into Prometheus metrics.

Times are seconds of `time.monotonic()`, taken by the engine's thread between steps.
"""

from dataclasses import dataclass, field

from nanovllm.outputs import RequestMetrics


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment, for other threads than its own. Counters only grow.

    Attributes:
        num_requests_deferred: those of the waiting sequences that wait for the mask of a grammar.
        kv_cache_usage: share of the KV cache in use, from 0 to 1.
        prompt_tokens: prompt tokens of the sequences whose prompt has been read.
        prompt_tokens_cached: those of them that were not computed for the sequence: their keys and
            values came from the prefix cache, or from another choice of the same prompt.
        prompt_tokens_computed: tokens that prefill has computed, of prompts that are not read to
            the end too, and of preempted sequences again.
        prefix_cache_queries, prefix_cache_hits: in tokens.
    """

    num_requests_running: int
    num_requests_waiting: int
    num_requests_deferred: int
    kv_cache_usage: float
    prompt_tokens: int
    prompt_tokens_cached: int
    prompt_tokens_computed: int
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

    Attributes:
        generation_tokens: those that the caller gets.
        max_tokens: the most that it could have; 0 where it only reads the prompt.
        prompt_tokens_cached: prompt tokens that were not computed for it.
        times: with `finished_s`.
    """

    finish_reason: str
    prompt_tokens: int
    generation_tokens: int
    max_tokens: int
    prompt_tokens_cached: int
    num_preemptions: int
    times: RequestMetrics


@dataclass(frozen=True, slots=True)
class FinishedPrompt:
    """One prompt all of whose choices ended.

    Attributes:
        n: choices that were asked for.
        max_generation_tokens: tokens of the longest choice.
    """

    n: int
    max_generation_tokens: int


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
    finished_prompts: list[FinishedPrompt] = field(default_factory=list)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that the step drew and callers get."""
        return len(self.times_to_first_token_s) + len(self.inter_token_latencies_s)
