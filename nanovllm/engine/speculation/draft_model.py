"""DraftModel: a smaller model that drafts what a larger one will say.

It has the blocks of the larger model's KV cache: the same block ids and slots, with its own keys
and values in them. It lags behind: its part of a block is filled when it first drafts for a
sequence, and a full block is found again by the hash of its tokens. A token that it drafts is drawn
by the settings, the seed and the position of the request, like the token of the larger model, so
the two agree as often as their probabilities do.

Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from nanovllm.engine.scheduling.batching import SampledRow, forward_batch, sampling_settings
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence, StepPlan
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.sampling import SamplingSettings
from nanovllm.runner.logit_rows import NO_PROMPT_ROWS, LogitRows
from nanovllm.runner.native_model_runner import NativeModelRunner

UNKNOWN = -1
"""A token that is drafted after the step has been planned."""
_NONE = np.empty(0, dtype=np.int64)


@dataclass(slots=True, eq=False)
class _Computed:
    """What the draft model has computed of a sequence.

    Attributes:
        num_tokens: leading known tokens whose keys and values it has.
        tail: tokens after them that it has computed too, and that may turn out to be right.
        block_ids: where they are.
    """

    num_tokens: int = 0
    tail: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Draft:
    """A sequence for which `count` tokens are drafted.

    Attributes:
        start, pending: the tokens to compute next, and the position of the first.
        tokens: what is drafted so far.
    """

    request: Request
    count: int
    start: int
    pending: list[int]
    tokens: tuple[int, ...] = ()

    @property
    def gives_token(self) -> bool:
        """Whether the next token is drawn after `pending`."""
        known = len(self.request.tokens) + len(self.tokens)
        return self.start + len(self.pending) == known


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The arguments of a step of the draft model; see NativeModelRunner.run.

    Attributes:
        is_steady: the settings of later tokens of the draft differ in their positions alone.
    """

    batch: ForwardBatch
    rows: LogitRows
    settings: SamplingSettings
    is_steady: bool

    @property
    def is_plain_greedy(self) -> bool:
        """Whether each sequence has one token to compute and takes the most likely one after it."""
        batch = self.batch
        is_decode = batch.tokens == batch.seqs == len(batch.logit_rows)
        return self.is_steady and is_decode and self.settings.is_plain_greedy

    def following(self, token_ids: Sequence[int], block_size: int) -> "_Inputs":
        """Return the inputs one token further, after each sequence got one of `token_ids`.

        They equal those that `DraftModel` makes from its drafts, if `is_steady`.
        """
        tokens = np.array(token_ids, dtype=np.int64)
        settings = replace(self.settings, positions=self.settings.positions + 1)
        return replace(self, batch=self.batch.following(tokens, block_size), settings=settings)


class DraftModel:
    """Drafts tokens by a network with its own KV cache, whose blocks are those of an engine."""

    def __init__(self, runner: NativeModelRunner, block_size: int, max_tokens: int) -> None:
        """Compute at most `max_tokens` tokens at once. The runner's cache is allocated."""
        self.runner = runner
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._computed: dict[str, _Computed] = {}
        self._hashes: dict[int, bytes] = {}  # of the full blocks that it has computed

    def num_missing(self, request: Request) -> int:
        """Return how many known tokens of a request it has not computed."""
        return len(request.tokens) - self._find_computed(request).num_tokens

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended; its blocks may be found again."""
        self._computed.pop(request_id, None)

    @staticmethod
    def drafts(sequence: PlannedSequence) -> bool:
        """Return whether a planned sequence waits for its draft."""
        return bool(sequence.drafted) and sequence.drafted[0] == UNKNOWN

    def draft(self, plan: StepPlan) -> StepPlan:
        """Return the plan with a token in place of each that is UNKNOWN.

        A sequence with many tokens to compute before is computed in parts, a part in each step, and
        has a draft after the last.
        """
        drafts: dict[str, _Draft] = {}
        left = self._max_tokens
        for sequence in plan.sequences:
            if self.drafts(sequence):
                request = sequence.request
                start = self._find_computed(request).num_tokens
                pending = request.tokens[start : start + left]
                left -= len(pending)
                count = len(sequence.drafted)
                drafts[request.request_id] = _Draft(request, count, start, pending)
        active = [draft for draft in drafts.values() if draft.pending]
        inputs = self._inputs(active) if active else None
        while inputs is not None:
            steps, num_sequences = self._step(active, inputs), len(active)
            active = [draft for draft in active if draft.pending]
            if steps == 1 and inputs.is_steady and len(active) == num_sequences:
                tokens = [draft.pending[0] for draft in active]
                inputs = inputs.following(tokens, self._block_size)
            else:
                inputs = self._inputs(active) if active else None
        return replace(plan, sequences=tuple(_filled(each, drafts) for each in plan.sequences))

    def _step(self, drafts: Sequence[_Draft], inputs: _Inputs) -> int:
        """Compute the pending tokens, and draw a token after them where they are all.

        Where each sequence has one pending token and takes the most likely ones, later steps are
        computed in the same call, until a sequence has its draft. Returns the number of steps.
        """
        steps = 1
        if inputs.is_plain_greedy:
            steps = min(draft.count - len(draft.tokens) for draft in drafts)
        giving = [draft for draft in drafts if draft.gives_token]
        rows = self.runner.draw(inputs.batch, inputs.rows, inputs.settings, steps)
        for row in rows:
            for draft in drafts:
                if draft.pending:
                    self._mark(draft)
                    draft.start += len(draft.pending)
                    draft.pending = []
            for draft, token in zip(giving, row, strict=True):
                if token is not None:
                    draft.tokens += (token,)
                    draft.pending = [token] if len(draft.tokens) < draft.count else []
        return len(rows)

    def _inputs(self, drafts: Sequence[_Draft]) -> _Inputs:
        """Return the inputs of a step that computes all pending tokens."""
        ends = accumulate(len(draft.pending) for draft in drafts)
        ends_of_rows = [end for draft, end in zip(drafts, ends, strict=True) if draft.gives_token]
        rows = [draft for draft in drafts if draft.gives_token]
        parts = [(draft.pending, draft.start, draft.request.block_ids) for draft in drafts]
        settings = sampling_settings([SampledRow(each.request, each.tokens) for each in rows])
        return _Inputs(
            forward_batch(parts, [end - 1 for end in ends_of_rows], self._block_size),
            LogitRows(np.arange(len(rows), dtype=np.int64), NO_PROMPT_ROWS, _NONE),
            replace(settings, num_logprobs=np.full(len(rows), -1, dtype=np.int64)),
            is_steady=not settings.has_lists
            and not any(
                each.request.rules.has_bad_sequences or each.request.sampling.has_penalties
                for each in rows
            ),
        )

    def _find_computed(self, request: Request) -> _Computed:
        """Return what is computed of a request: what it was, or full blocks by their hashes.

        The last known token is computed again, because the next one is drawn after it.
        """
        computed = self._computed.setdefault(request.request_id, _Computed())
        if computed.block_ids != request.block_ids[: len(computed.block_ids)]:
            computed.num_tokens, computed.tail = 0, []  # preempted, or it has found other blocks
        for token in computed.tail:
            if request.tokens[computed.num_tokens : computed.num_tokens + 1] != [token]:
                break
            computed.num_tokens += 1
        computed.tail = []
        index, hashes = computed.num_tokens // self._block_size, request.block_hashes
        for block, block_hash in zip(request.block_ids[index:], hashes[index:], strict=False):
            if self._hashes.get(block) != block_hash:
                break
            index += 1
            computed.num_tokens = max(computed.num_tokens, index * self._block_size)
        computed.num_tokens = min(computed.num_tokens, len(request.tokens) - 1)
        return computed

    def _mark(self, draft: _Draft) -> None:
        """Record that the pending tokens of a draft are computed."""
        request, computed = draft.request, self._computed[draft.request.request_id]
        end = draft.start + len(draft.pending)
        if draft.tokens:
            computed.tail += draft.pending
        else:
            computed.num_tokens = end
        computed.block_ids = request.block_ids[: -(-end // self._block_size)]
        for index in range(draft.start // self._block_size, len(computed.block_ids)):
            block = request.block_ids[index]
            self._hashes.pop(block, None)
            is_full = (index + 1) * self._block_size <= computed.num_tokens
            if is_full and index < len(request.block_hashes):
                self._hashes[block] = request.block_hashes[index]


def _filled(sequence: PlannedSequence, drafts: Mapping[str, _Draft]) -> PlannedSequence:
    """Return a planned sequence with the tokens of its draft."""
    draft = drafts.get(sequence.request.request_id)
    if draft is None or sequence.source is not None:
        return sequence
    count = sequence.count - len(sequence.drafted) + len(draft.tokens)
    return replace(sequence, count=count, drafted=draft.tokens)
