"""The scheduler's plan of a step, and what the step changes of each sequence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import eq

import numpy as np
import numpy.typing as npt

from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.errors import NanovllmError
from nanovllm.model.sampling import TokenLogprobs


@dataclass(frozen=True, slots=True)
class MaskStates:
    """Ids of the requests whose grammar's next mask is missing when a step is planned.

    The step has one view of the masks, taken before it is planned.

    Attributes:
        blocked: requests that cannot run in this step.
        late: those of them that have been blocked for so long that they may be preempted.
        failed: requests whose mask will never arrive.
    """

    blocked: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()

    @classmethod
    def read(cls, requests: Iterable[Request], now_s: float) -> "MaskStates":
        """Return the states of `requests` at the time `now_s`, by `time.monotonic()`."""
        blocked, late, failed = set(), set(), set()
        for request in requests:
            grammar = request.grammar
            if grammar is not None and grammar.error is not None:
                failed.add(request.request_id)
            elif grammar is not None and not grammar.is_ready:
                blocked.add(request.request_id)
                if grammar.is_late(now_s):
                    late.add(request.request_id)
        return cls(frozenset(blocked), frozenset(late), frozenset(failed))


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """The part of a step that belongs to one request: `count` tokens from position `start`.

    Attributes:
        drafted: the last of them that are not known yet, only expected. Each row from the last
            known token on is sampled, as far as the tokens that are drawn are the expected ones.
        samples: whether the step computes the last known token, so that the next is sampled.
        prompt_logprob_positions: prompt positions whose log-probability the step reports; each is
            computed from the logits of the position before it.
        hidden_positions: prompt positions whose final hidden state the step reports.
        source: the sibling from which a fork starts, whose prompt is completed in this step. A
            fork computes no tokens and samples from the same row. None for other sequences.
    """

    request: Request
    start: int
    count: int
    samples: bool
    prompt_logprob_positions: range
    hidden_positions: range
    source: Request | None = None
    drafted: tuple[int, ...] = ()

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest known token is computed, before drafted ones."""
        is_newest = self.samples and self.count == 1 + len(self.drafted)
        return is_newest and self.start >= self.request.num_prompt_tokens

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens to compute."""
        return [*self.request.tokens[self.start : self.start + self.count], *self.drafted]

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
        """Plan the first token of a choice whose prompt `source` completes in this step."""
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
        """Number of tokens that the step computes."""
        return sum(sequence.count for sequence in self.sequences)


class StepBuilder:
    """Builder of a `StepPlan`: a step while it is being planned.

    Attributes:
        sequences: what is planned so far, by request id.
        max_tokens, tokens_left: the token budget, and what remains of it.
        num_prompts: number of prompts that share the budget.
        is_full: whether the blocks do not suffice to admit another request.
        has_evicted: whether a request was preempted because no block was free.
        debts: costs to charge to the clients of requests beside those of `sequences`.
    """

    __slots__ = (
        "debts", "has_evicted", "is_full", "max_tokens", "num_prompts", "sequences", "tokens_left",
    )  # fmt: skip

    def __init__(self, max_tokens: int, num_prompts: int) -> None:
        """Start with a budget of `max_tokens` tokens."""
        self.sequences: dict[str, PlannedSequence] = {}
        self.max_tokens = self.tokens_left = max_tokens
        self.num_prompts = num_prompts
        self.is_full = self.has_evicted = False
        self.debts: list[tuple[Request, int]] = []

    def chunk_size(self, request: Request, num_waiting: int) -> int:
        """Return the chunk size of a prompt: at most half of the budget if other prompts wait."""
        others_wait = num_waiting > 0 or self.num_prompts > 1
        limit = max(self.max_tokens // 2, 1) if others_wait else self.tokens_left
        return min(request.num_uncomputed_tokens, self.tokens_left, limit)

    def put(self, sequence: PlannedSequence) -> None:
        """Plan a sequence, or plan it with another number of tokens."""
        planned = self.sequences.get(sequence.request.request_id)
        self.tokens_left += (0 if planned is None else planned.count) - sequence.count
        self.sequences[sequence.request.request_id] = sequence

    def remove(self, request: Request) -> PlannedSequence | None:
        """Remove a request and return its planned sequence; None if it is not planned."""
        planned = self.sequences.pop(request.request_id, None)
        self.tokens_left += 0 if planned is None else planned.count
        return planned


@dataclass(slots=True)
class SequenceUpdate:
    """What a step changes of one sequence.

    The engine's thread fills it: `batching.split` the results, of which `Scheduler.commit` keeps
    those up to the end of the sequence, and the engine the state after the step. From then on it
    does not change, and other threads may read it, but of `request` only what is constant.

    Attributes:
        token_ids: new tokens: drafted ones that were drawn too, and one more; empty if none was
            sampled.
        logprobs: an entry for each new token, or empty if none are requested.
        drafted: the tokens that were expected; those of them that were drawn begin `token_ids`.
        hides_rejected: whether only accepted ones of `drafted` may be shown, because they are
            text of other requests.
        prompt_logprobs: an entry for each planned prompt position.
        hidden: final hidden states [hidden_positions, d_model]; None without such positions.
        is_finite: whether the network's output is finite. If not, all blocks that the request
            computed leave the prefix cache.
        cause: the exception that ended this request and no other.
        error: the exception to raise if `finish_reason` is ERROR.
        num_reused_tokens: prompt tokens that were cached, or computed by another choice.
        time_s: end of the step.
        inter_token_latency_s: time since the step of the previous token; None for the first token,
            and if there is no new one.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    hidden: npt.NDArray[np.float32] | None = None
    is_finite: bool = True
    cause: Exception | None = None
    drafted: tuple[int, ...] = ()
    hides_rejected: bool = False

    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: NanovllmError | None = None
    num_cached_tokens: int = 0
    num_reused_tokens: int = 0
    num_preemptions: int = 0
    time_s: float = 0.0
    inter_token_latency_s: float | None = None

    @property
    def request_id(self) -> str:
        """Id of the sequence."""
        return self.request.request_id

    def num_accepted(self, num_tokens: int | None = None) -> int:
        """Return how many of the new tokens, or of the first `num_tokens`, had been drafted."""
        return sum(map(eq, self.token_ids[:num_tokens], self.drafted))

    def apply(self, sequence: PlannedSequence) -> None:
        """Apply the results to the request, and keep only the tokens that were appended.

        `Request.finish_reason` is set if the request has ended.
        """
        request, self.drafted = self.request, sequence.drafted
        request.next_prompt_logprob += len(sequence.prompt_logprob_positions)
        request.next_hidden += len(sequence.hidden_positions)
        request.num_computed_tokens += sequence.count - len(sequence.drafted)
        has_output = sequence.samples or self.hidden is not None
        if (sequence.samples and not self.token_ids) or (has_output and not self.is_finite):
            request.finish_reason = FinishReason.ERROR
        elif self.token_ids:
            try:
                count = request.append(self.token_ids)
            except Exception as error:  # noqa: BLE001 - it ends this request and no other
                request.finish_reason, request.stop_reason = FinishReason.ERROR, None
                self.cause, count = error, 0
            self.token_ids, self.logprobs = self.token_ids[:count], self.logprobs[:count]
            request.num_computed_tokens += max(count - 1, 0)  # the accepted ones of `drafted`
        elif request.max_new_tokens == 0 and request.num_uncomputed_tokens == 0:
            request.finish_reason = FinishReason.LENGTH

    def add_state(self, now_s: float) -> None:
        """Add the state of the request after the step, which ended at `now_s`."""
        request = self.request
        self.finish_reason, self.stop_reason = request.finish_reason, request.stop_reason
        self.num_cached_tokens = request.num_cached_tokens or 0
        self.num_reused_tokens = request.num_reused_tokens
        self.num_preemptions = request.num_preemptions
        self.time_s = now_s


NO_MASKS_MISSING = MaskStates()
_NO_POSITIONS = range(0)
