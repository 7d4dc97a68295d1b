"""What a request gives back: the shapes that people know from vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """One token's natural log-probability at a position, before temperature, penalties and filters.

    `rank` is 1 for the most likely token; `decoded_token` is the token's own text, with U+FFFD where it is part of a character.
    """

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]
"""{token id: Logprob} of one position: the token that stands there, and the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One answer, or, while streaming, what is new of it.

    Attributes:
        index: which of the prompt's n answers; where they are the best of more, 0 is the best.
        finish_reason: "stop" (end of text, stop token or stop string), "length", "abort", "error", or None while it goes on.
            After "error" the text and the tokens are those from before it.
        stop_reason: the stop string or stop token id that ended it; None for end of text.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Sequence[PositionLogprobs] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic()`."""

    arrival_s: float
    first_scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its answers.

    Attributes:
        prompt: the prompt's text; of a truncated prompt what was kept of it; None where the prompt was given as token ids.
        prompt_token_ids: those that were read, after truncation.
        prompt_logprobs: one entry per prompt token, None for the first; None where it was not asked for.
        num_cached_tokens: prompt tokens whose keys and values were in the prefix cache when the first of the answers was begun.
        num_generated_tokens: tokens so far of all answers that were asked for, also of those that best_of left out, and of each of several
            equal ones.
        error: why an answer ended with finish_reason "error"; None where none did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Sequence[PositionLogprobs | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A prompt as a vector of d_model numbers, each exactly a float32."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its embedding, which is empty where `error` says why there is none.

    The other fields are those of RequestOutput.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
