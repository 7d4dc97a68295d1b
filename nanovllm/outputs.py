"""Outputs of requests, named as in vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """A token's natural log-probability, before temperature, penalties and filters.

    `rank` is 1 for the most likely token. `decoded_token` is the token's text, with U+FFFD for a
    part of a character.
    """

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""{token id: Logprob} of one position: the sampled or prompt token, and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One choice; while streaming, the part of it that is new.

    Attributes:
        index: index among the n choices of the prompt. With `best_of`, 0 is the best.
        finish_reason: "stop" (end-of-text token, stop token or stop string), "length", "abort" or
            "error"; None while unfinished. With "error", text and tokens end before the error.
        stop_reason: the stop string or stop token id; None for the end-of-text token.
        drafted_token_ids: for each token the one that was drafted in its place, None without a
            draft. They depend on measured times, so that a comparison leaves them out.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Sequence[PositionLogprobs] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    drafted_token_ids: list[int | None] = field(default_factory=list, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of a request's events, in seconds of `time.monotonic()`."""

    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its choices.

    Attributes:
        prompt: text of the prompt after truncation; None for a prompt of token ids.
        prompt_token_ids: token ids of the prompt after truncation.
        prompt_logprobs: one entry per prompt token, None for the first; None unless requested.
        outputs: the choices.
        num_cached_tokens: prompt tokens that the first choice found in the prefix cache.
        num_generated_tokens: tokens generated so far for all choices, including those that best_of
            discards, and counting each of several equal choices.
        num_drafted_tokens: tokens that speculative decoding has drafted for them.
        num_accepted_tokens: those of the generated tokens that were drafted.
        error: why a choice ended with finish_reason "error"; None where none did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Sequence[PositionLogprobs | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The embedding of a prompt: d_model numbers, each exactly representable in float32."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding; with `error`, the embedding is empty.

    See RequestOutput for the other fields.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
