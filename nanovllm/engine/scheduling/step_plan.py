"""What the scheduler says and hears: the plan of a step, what the runner found, and what that changed for each request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nanovllm.engine.scheduling.request import FinishReason, Request

L = TypeVar("L")  # a report of log-probabilities, which the scheduler only passes on


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A request's share of a step: `count` tokens from position `start`.

    Attributes:
        samples: whether the step computes all of its known tokens, so that the next can be drawn.
        prompt_logprob_positions: prompt positions whose log-probability the step can report; the row before each is computed in it.
        hidden_positions: prompt positions whose final hidden state the request wants of this step.
        source: of a fork, the request whose prompt ends in this step. It computes nothing and draws from the same row.
    """

    request: Request
    start: int
    count: int
    samples: bool
    prompt_logprob_positions: range
    hidden_positions: range
    source: Request | None = None

    @classmethod
    def of(cls, request: Request, count: int) -> "PlannedSequence":
        """The request's next `count` tokens."""
        start = request.num_computed_tokens
        reported = range(0)
        if request.wants_prompt_logprobs:
            reported = range(
                max(request.next_prompt_logprob, start + 1),
                min(start + count + 1, request.num_prompt_tokens),
            )
        hidden = (
            range(max(request.next_hidden, start), start + count)
            if request.pooling is not None
            else range(0)
        )
        return cls(
            request,
            start,
            count,
            start + count == len(request.tokens) and request.max_new_tokens > 0,
            reported,
            hidden,
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences first, forks last.

    Attributes:
        copies: cache blocks to copy before anything is computed, each as (from, to); all are read before any is written to.
    """

    sequences: tuple[PlannedSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(sequence.count for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceResult(Generic[L]):
    """What the runner found for one planned sequence.

    Attributes:
        token_id: None where it sampled none or could not.
        hidden: the rows of `hidden_positions`, None where there are none; the scheduler only passes them on.
        is_finite: whether the network's output was finite. If not, no block that the request computed may be found again.
    """

    token_id: int | None
    logprobs: L | None = None
    prompt_logprobs: Sequence[L] = ()
    hidden: object | None = None
    is_finite: bool = True


@dataclass(frozen=True, slots=True)
class RequestUpdate(Generic[L]):
    """What a step changed for one request.

    Attributes:
        is_finite: as in SequenceResult.
        fault: the exception that ended this request alone.
    """

    request: Request
    token_id: int | None
    logprobs: L | None
    prompt_logprobs: Sequence[L]
    finish_reason: FinishReason | None
    hidden: object | None = None
    is_finite: bool = True
    fault: Exception | None = None
