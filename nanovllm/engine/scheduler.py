"""Which requests run in the next step, how many tokens of each, and in which blocks.

One token budget a step. First every decoding request gets its one token; then prompts are read in (priority, arrival) order, in
chunks as large as the budget leaves (Sarathi-Serve, Agrawal et al. 2024, arXiv:2403.02310); then waiting requests are admitted in the
same order. Out of blocks, the running request that comes last in that order is preempted: its blocks are freed and it is computed
again later. So the request that comes first always makes progress, and since none is accepted that could not run alone, all finish.

No arrays, clock, threads or I/O: it can be tested with integers.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from nanovllm.engine.block_manager import BlockManager, hash_block, hash_salt
from nanovllm.engine.request import FinishReason, Request, RequestState

L = TypeVar("L")  # a report of log-probabilities, which the scheduler only passes on


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """A request's share of a step: `count` tokens from position `start`.

    Attributes:
        samples: whether the step computes all of its known tokens, so that the next can be drawn.
        prompt_logprob_positions: prompt positions whose log-probability the step can report; the row before each is computed in it.
        hidden_positions: prompt positions whose final hidden state the request wants of this step.
    """

    request: Request
    start: int
    count: int
    samples: bool
    prompt_logprob_positions: range
    hidden_positions: range

    @classmethod
    def of(cls, request: Request, count: int) -> "PlannedSequence":
        """The request's next `count` tokens."""
        start = request.num_computed_tokens
        reported = range(0)
        if request.wants_prompt_logprobs:
            reported = range(max(request.next_prompt_logprob, start + 1), min(start + count + 1, request.num_prompt_tokens))
        hidden = range(max(request.next_hidden, start), start + count) if request.pooling is not None else range(0)
        return cls(request, start, count, start + count == len(request.tokens) and request.max_new_tokens > 0, reported, hidden)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decoding sequences first."""

    sequences: tuple[PlannedSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(sequence.count for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceResult(Generic[L]):
    """What the runner found for one planned sequence; `token_id` is None where it sampled none or could not.

    `hidden` are the rows of `hidden_positions`, None where there are none; the scheduler only passes them on.
    """

    token_id: int | None
    logprobs: L | None = None
    prompt_logprobs: Sequence[L] = ()
    hidden: object | None = None


@dataclass(frozen=True, slots=True)
class RequestUpdate(Generic[L]):
    """What a step changed for one request."""

    request: Request
    token_id: int | None
    logprobs: L | None
    prompt_logprobs: Sequence[L]
    finish_reason: FinishReason | None
    hidden: object | None = None


class Scheduler:
    """Decides each step. `add`, `abort`, `schedule` and `commit` are called by one thread."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Schedule over `blocks`; at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens a step."""
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # in tokens, as are the hits
        self.prefix_cache_hits = 0
        self._requests: dict[str, Request] = {}
        self._queue: list[tuple[tuple[int, int], Request]] = []  # a heap; requests aborted while waiting stay until they come up
        self._arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or no longer."""
        return len(self._requests) - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def request_ids(self) -> set[str]:
        """Ids of the unfinished requests."""
        return set(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request. Ids must be unique among the unfinished ones, and the intake has checked that it fits."""
        assert request.request_id not in self._requests, f"request id {request.request_id} is in use"
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.request_id] = request
        heapq.heappush(self._queue, (request.order, request))

    def abort(self, request_id: str) -> RequestUpdate[object] | None:
        """End a request in whatever state it is; None where no unfinished one has that id."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = FinishReason.ABORT
        self._finish(request)
        if len(self._queue) > 2 * self.num_waiting + 64:  # a burst of aborted requests behind one that waits must not pile up
            self._queue = [entry for entry in self._queue if entry[1].state is RequestState.WAITING]
            heapq.heapify(self._queue)
        return RequestUpdate(request, None, None, (), FinishReason.ABORT)

    def schedule(self) -> StepPlan:
        """Plan the next step and take the blocks that it needs. An empty plan means that there is nothing to do."""
        preemptions = self.num_preemptions
        planned: dict[str, PlannedSequence] = {}
        in_order = sorted(self.running, key=lambda request: request.order)
        for request in in_order:
            if request.is_decoding and self._make_room(request, 1, planned):
                self._plan(request, 1, planned)
        for request in in_order:
            if request.state is RequestState.RUNNING and not request.is_decoding:
                self._continue_prompt(request, planned)
        if self.num_preemptions == preemptions:
            self._admit(planned)
        self._spend_rest(planned)
        plan = StepPlan(tuple(planned.values()))
        assert plan.sequences or not self._requests, "work is waiting, yet nothing can run"
        return plan

    def commit(self, plan: StepPlan, results: Iterable[SequenceResult[L]]) -> list[RequestUpdate[L]]:
        """Book what a planned step computed: append tokens, finish requests, free their blocks."""
        updates: list[RequestUpdate[L]] = []
        for sequence, result in zip(plan.sequences, results, strict=True):
            request = sequence.request
            if request.state is not RequestState.RUNNING:
                continue  # aborted since it was planned
            request.next_prompt_logprob += len(sequence.prompt_logprob_positions)
            request.next_hidden += len(sequence.hidden_positions)
            request.num_computed_tokens += sequence.count
            if sequence.samples and result.token_id is None:
                request.finish_reason = FinishReason.ERROR
            elif sequence.samples and result.token_id is not None:
                request.append(result.token_id)
            elif request.max_new_tokens == 0 and request.num_uncomputed_tokens == 0:
                request.finish_reason = FinishReason.LENGTH
            if request.finish_reason is not None:
                self._finish(request)
            reason = request.finish_reason
            updates.append(RequestUpdate(request, result.token_id, result.logprobs, result.prompt_logprobs, reason, result.hidden))
        return updates

    def fail(self, plan: StepPlan) -> list[RequestUpdate[object]]:
        """Book a step that raised: its requests end with an error, and nothing cached is trusted any more."""
        updates: list[RequestUpdate[object]] = []
        for sequence in plan.sequences:
            if sequence.request.state is RequestState.RUNNING:
                sequence.request.finish_reason = FinishReason.ERROR
                self._finish(sequence.request)
                updates.append(RequestUpdate(sequence.request, None, None, (), FinishReason.ERROR))
        self.blocks.clear_cache()
        for request in list(self.running):  # not planned, but it may share a block that the step was to fill
            self._preempt(request, {})
        return updates

    def check_integrity(self) -> None:
        """Assert that the books balance: every block has its owners, every request is where its state says."""
        self.blocks.check_integrity(request.block_ids for request in self._requests.values())
        assert {request.request_id for request in self.running} <= self._requests.keys()
        for request in self._requests.values():
            assert (request.state is RequestState.RUNNING) == (request in self.running)
            assert request.state is not RequestState.FINISHED
            assert len(request.block_ids) >= self.blocks.blocks_for(request.num_computed_tokens)
            assert request.state is RequestState.RUNNING or not request.block_ids

    def _left(self, planned: dict[str, PlannedSequence]) -> int:
        return self.max_num_batched_tokens - sum(sequence.count for sequence in planned.values())

    def _chunk(self, request: Request, planned: dict[str, PlannedSequence]) -> int:
        """Tokens of a prompt to read now: at most half of the budget while another prompt could use the rest."""
        left = self._left(planned)
        others_wait = self.num_waiting > 0 or sum(not other.is_decoding for other in self.running) > 1
        share = max(self.max_num_batched_tokens // 2, 1) if others_wait else left
        return min(request.num_uncomputed_tokens, left, share)

    def _continue_prompt(self, request: Request, planned: dict[str, PlannedSequence]) -> None:
        self._take_cached_blocks(request)
        count = self._chunk(request, planned)
        if count > 0 and self._make_room(request, count, planned):
            self._plan(request, count, planned)

    def _plan(self, request: Request, count: int, planned: dict[str, PlannedSequence]) -> None:
        """Put a request that has its blocks into the step, and make blocks findable that will be full after it.

        Requests planned later in the same step can share them already, because every layer stores all of a batch's keys and values
        before any of its queries reads them.
        """
        sequence = planned[request.request_id] = PlannedSequence.of(request, count)
        full = (sequence.start + count) // self.blocks.block_size if self.blocks.enable_prefix_caching else 0
        for index in range(request.num_registered_blocks, full):
            self.blocks.register(request.block_ids[index], self._hash(request, index))
        request.num_registered_blocks = max(request.num_registered_blocks, full)

    def _unplan(self, sequence: PlannedSequence) -> set[int]:
        """Take back what `_plan` made findable: it will not be computed in this step. Returns the blocks."""
        request = sequence.request
        indices = range(sequence.start // self.blocks.block_size, request.num_registered_blocks)
        for index in indices:
            self.blocks.unregister(request.block_ids[index], request.block_hashes[index])
        return {request.block_ids[index] for index in indices}

    def _admit(self, planned: dict[str, PlannedSequence]) -> None:
        """Start waiting requests, strictly in order, while there are seats, tokens and blocks for all that they are known to need."""
        while self._queue and len(self.running) < self.max_num_seqs and self._left(planned) > 0:
            request = self._queue[0][1]
            if request.state is not RequestState.WAITING:
                heapq.heappop(self._queue)
                continue
            self._take_cached_blocks(request)
            promised = sum(max(0, self.blocks.blocks_for(len(r.tokens)) - len(r.block_ids)) for r in self.running)
            growth = len(self.running)  # a block each for those that run, so that admitting does not at once lead to preempting
            if self.blocks.blocks_for(len(request.tokens)) - len(request.block_ids) > self.blocks.num_free - promised - growth:
                self._release(request)
                return
            heapq.heappop(self._queue)
            count = self._chunk(request, planned)
            request.move_to(RequestState.RUNNING)
            self.running.append(request)
            self._count_prefix_hits(request)
            self._grow(request, count)
            self._plan(request, count, planned)

    def _spend_rest(self, planned: dict[str, PlannedSequence]) -> None:
        """Give tokens that nobody else could use to prompts whose share was limited."""
        for sequence in list(planned.values()):
            request = sequence.request
            missing = request.num_uncomputed_tokens - sequence.count
            if missing == 0:
                continue
            more = min(self._left(planned), missing)
            room = (self.blocks.num_free + len(request.block_ids)) * self.blocks.block_size - sequence.start - sequence.count
            more = min(more, room)
            if more > 0:
                self._grow(request, sequence.count + more)
                self._plan(request, sequence.count + more, planned)

    def _make_room(self, request: Request, count: int, planned: dict[str, PlannedSequence]) -> bool:
        """Get blocks for `count` more tokens, preempting whoever comes last; False where that is the request itself."""
        if request.state is not RequestState.RUNNING:
            return False
        needed = self.blocks.blocks_for(request.num_computed_tokens + count) - len(request.block_ids)
        while needed > self.blocks.num_free:
            self._preempt(max(self.running, key=lambda other: other.order), planned)
            if request.state is not RequestState.RUNNING:
                return False
        self._grow(request, count)
        return True

    def _grow(self, request: Request, count: int) -> None:
        needed = self.blocks.blocks_for(request.num_computed_tokens + count) - len(request.block_ids)
        if needed > 0:
            request.block_ids += self.blocks.allocate(needed)

    def _preempt(self, request: Request, planned: dict[str, PlannedSequence]) -> None:
        """Set a request back to be computed again, and with it whoever shares a block that it was to fill in this step."""
        sequence = planned.pop(request.request_id, None)
        never_filled = self._unplan(sequence) if sequence is not None else set()
        self.running.remove(request)
        request.move_to(RequestState.WAITING)
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        heapq.heappush(self._queue, (request.order, request))
        for other in list(self.running):
            if other.state is RequestState.RUNNING and not never_filled.isdisjoint(other.block_ids):
                self._preempt(other, planned)

    def _finish(self, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.move_to(RequestState.FINISHED)
        self._release(request)
        del self._requests[request.request_id]

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_registered_blocks = 0

    def _take_cached_blocks(self, request: Request) -> None:
        """Share blocks that hold a request's next tokens already, leaving at least one token to compute.

        Done at every chunk and not only at the first: another request with the same prompt may be a chunk ahead. A block of its own
        that the request has begun is given back for a whole one.
        """
        size = self.blocks.block_size
        if request.needs_whole_prompt or not self.blocks.enable_prefix_caching:
            return
        index = request.num_computed_tokens // size
        while (index + 1) * size < len(request.tokens):
            block = self.blocks.find(self._hash(request, index))
            if block is None:
                return
            self.blocks.share(block)
            self.blocks.free(request.block_ids[index:])
            request.block_ids[index:] = [block]
            index += 1
            request.num_computed_tokens = index * size
            request.num_registered_blocks = index

    def _count_prefix_hits(self, request: Request) -> None:
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.prefix_cache_queries += request.num_prompt_tokens
            self.prefix_cache_hits += request.num_cached_tokens

    def _hash(self, request: Request, index: int) -> bytes:
        """Name of the request's block `index`; those of all blocks before it are computed on the way and kept."""
        size = self.blocks.block_size
        while len(request.block_hashes) <= index:
            done = len(request.block_hashes)
            parent = request.block_hashes[-1] if done else hash_salt(request.cache_salt)
            request.block_hashes.append(hash_block(parent, request.tokens[done * size : (done + 1) * size]))
        return request.block_hashes[index]
