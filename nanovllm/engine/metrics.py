"""Statistics of the engine as plain numbers; the server exports them as Prometheus metrics.

Times are in seconds of `time.monotonic()`, measured on the engine's thread between steps.
"""

from dataclasses import dataclass, field
from typing import Any

from nanovllm.outputs import RequestMetrics
from nanovllm.speculative_config import SpeculativeConfig


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Statistics of the engine at one moment, which any thread may read.

    The first four are gauges, the others counters.

    Attributes:
        num_requests_running, num_requests_waiting: numbers of sequences.
        num_requests_deferred: waiting sequences that waited for the mask of a grammar when the last
            step was planned.
        kv_cache_usage: used fraction of the KV cache, from 0 to 1.
        prompt_tokens: prompt tokens of the sequences whose prompt is completely computed.
        prompt_tokens_cached: those of them whose keys and values came from the prefix cache or from
            another choice of the prompt.
        prompt_tokens_computed: tokens computed by prefill, including incomplete prompts and
            recomputation after preemption.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up, and found.
        num_drafts, num_draft_tokens: drafts that were verified, and their tokens.
        num_accepted_tokens: drafted tokens that were drawn too. Like `generation_tokens`, those of
            a server exclude what was computed after a stop string.
        num_accepted_tokens_per_pos: the same by their index in the draft; empty without
            speculative decoding.
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
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]


@dataclass(slots=True)
class TokenCounts:
    """The counters of tokens of EngineSnapshot, as the engine adds them up."""

    prompt: int = 0
    prompt_cached: int = 0
    prompt_computed: int = 0
    generated: int = 0

    def add_prompt(self, num_tokens: int, num_reused: int) -> None:
        """Count a prompt that has been computed to its end for the first time."""
        self.prompt += num_tokens
        self.prompt_cached += num_reused


@dataclass(slots=True)
class DraftCounts:
    """The counters of drafts of EngineSnapshot, as they are added up.

    Attributes:
        accepted_by_position: accepted tokens by their index in the draft.
        drafts: sequences of drafted tokens that were verified.
        drafted, accepted: tokens.
    """

    accepted_by_position: list[int]
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def begin(cls, config: SpeculativeConfig | None) -> "DraftCounts":
        """Return counters of nothing."""
        return cls([0] * (0 if config is None else config.num_speculative_tokens))

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count a draft that was verified."""
        self.drafts += 1
        self.drafted += num_drafted
        self.accepted += num_accepted
        for index in range(num_accepted):
            self.accepted_by_position[index] += 1

    def fields(self) -> dict[str, Any]:
        """Return the counters by their names in EngineSnapshot."""
        return {
            "num_drafts": self.drafts,
            "num_draft_tokens": self.drafted,
            "num_accepted_tokens": self.accepted,
            "num_accepted_tokens_per_pos": tuple(self.accepted_by_position),
        }


@dataclass(frozen=True, slots=True)
class AdmissionStats:
    """Reservations of unfinished requests, their limits, and numbers of refusals by limit.

    `choices` counts the choices of all prompts. `max_tokens` is None if tokens are not limited.
    """

    choices: int
    tokens: int
    max_choices: int
    max_tokens: int | None
    refused: dict[str, int]


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A finished sequence, for the histograms of requests.

    Attributes:
        generation_tokens: tokens that the caller receives.
        max_tokens: maximum tokens to generate; 0 for a request that only computes the prompt.
        prompt_tokens_cached: prompt tokens that were cached, or computed by another choice.
        times: times of the sequence; `finished_s` is not None.
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
    """A prompt whose choices have all ended.

    Attributes:
        n: number of choices.
        max_generation_tokens: tokens of the longest choice.
    """

    n: int
    max_generation_tokens: int


@dataclass(slots=True)
class StepStats:
    """Statistics of one step, for the histograms of steps and tokens.

    UpdateRouter fills the lists when it delivers the step's updates. They exclude tokens that were
    computed after a stop string. Tokens that come together divide the time since those before them.

    Attributes:
        num_tokens: tokens that the step computed, drafted ones included.
        num_prompt_tokens: those of prompts, and those that preempted sequences recomputed.
        num_decode_tokens: tokens that decoding sequences got; one each without drafts.
        drafts: drafted and accepted tokens of each draft that was verified.
    """

    num_tokens: int
    num_prompt_tokens: int
    num_decode_tokens: int
    duration_s: float
    times_to_first_token_s: list[float] = field(default_factory=list)
    inter_token_latencies_s: list[float] = field(default_factory=list)
    drafts: list[tuple[int, int]] = field(default_factory=list)
    finished: list[FinishedRequest] = field(default_factory=list)
    finished_prompts: list[FinishedPrompt] = field(default_factory=list)

    @property
    def num_generated_tokens(self) -> int:
        """Number of sampled tokens that callers receive."""
        return len(self.times_to_first_token_s) + len(self.inter_token_latencies_s)


class TokenRates:
    """Prefill and decode tokens per second, for a progress bar.

    The time of a step with both kinds of tokens is divided in proportion to those computed.
    """

    def __init__(self) -> None:
        self._prompt_tokens = self._decode_tokens = 0
        self._prompt_s = self._decode_s = 0.0

    def add(self, stats: StepStats) -> None:
        """Count a step."""
        if stats.num_tokens:
            self._prompt_tokens += stats.num_prompt_tokens
            self._decode_tokens += stats.num_decode_tokens
            self._prompt_s += stats.duration_s * stats.num_prompt_tokens / stats.num_tokens
            num_computed = stats.num_tokens - stats.num_prompt_tokens
            self._decode_s += stats.duration_s * num_computed / stats.num_tokens

    def __str__(self) -> str:
        prefill = self._prompt_tokens / self._prompt_s if self._prompt_s else 0.0
        decode = self._decode_tokens / self._decode_s if self._decode_s else 0.0
        return f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s"
