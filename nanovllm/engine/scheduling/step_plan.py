"""Messages of a step: the scheduler's plan, and what the step computed for each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanovllm.engine.scheduling.request import Request
from nanovllm.model.sampling import TokenLogprobs


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A request's share of a step: `count` tokens from position `start`.

    Attributes:
        samples: the step computes all known tokens, so the next one is sampled.
        prompt_logprob_positions: prompt positions whose log-probability the step reports; each is
            computed from the row before it.
        hidden_positions: prompt positions whose final hidden state the step reports.
        source: of a fork, the request whose prompt ends in this step. The fork computes no tokens
            and samples from the same row.
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
        """Plan the request's next `count` tokens."""
        start = request.num_computed_tokens
        prompt_logprobs = hidden = _NO_POSITIONS
        if request.wants_prompt_logprobs:
            prompt_logprobs = range(
                max(request.next_prompt_logprob, start + 1),
                min(start + count + 1, request.num_prompt_tokens),
            )
        if request.pooling is not None:
            hidden = range(max(request.next_hidden, start), start + count)
        samples = start + count == len(request.tokens) and request.max_new_tokens > 0
        return cls(request, start, count, samples, prompt_logprobs, hidden)

    @classmethod
    def fork(cls, request: Request, source: Request) -> "PlannedSequence":
        """Plan the first token of a choice whose prompt `source` reads to its end in this step."""
        start = source.num_prompt_tokens
        return cls(request, start, 0, True, _NO_POSITIONS, _NO_POSITIONS, source)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences first, forks last.

    Attributes:
        copies: blocks to copy before the forward pass, each as (from, to). All sources are read
            before any target is written.
    """

    sequences: tuple[PlannedSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(sequence.count for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a step computed for one sequence. The scheduler only looks at the tokens.

    Attributes:
        token_ids: sampled tokens, at most one today; empty where none was or could be sampled.
        logprobs: an entry for each token, or empty where the request does not ask for them.
        prompt_logprobs: an entry for each planned prompt position.
        hidden: final hidden states [hidden_positions, d_model]; None without such positions.
        is_finite: the network's output was finite. If not, no block that the request computed may
            be found in the prefix cache again.
        error: the exception that ended this request alone.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    hidden: npt.NDArray[np.float32] | None = None
    is_finite: bool = True
    error: Exception | None = None


_NO_POSITIONS = range(0)
