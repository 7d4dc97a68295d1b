"""Which requests run in the next step, how many tokens of each, and in which blocks.

One token budget a step. First every decoding request gets its one token; then prompts are read in (priority, arrival) order, in
chunks as large as the budget leaves (Sarathi-Serve, Agrawal et al. 2024, arXiv:2403.02310); then waiting requests are admitted in the
same order. Out of blocks, the running request that comes last in that order is preempted: its blocks are freed and it is computed
again later. So the request that comes first always makes progress, and since none is accepted that could not run alone, all finish.

Requests of one group, n answers to one prompt, compute that prompt once: one reads it while the others, which have their seats, wait;
then they fork from it. A fork holds the same blocks, also the last, partly filled one. Whoever writes to a block that it does not hold
alone gets a copy first (copy on write), so no answer is ever written into another's.

No arrays, clock, threads or I/O: it can be tested with integers.
"""

import heapq
from collections.abc import Iterable
from typing import Any

from nanovllm.engine.scheduling.block_manager import BlockManager, hash_block, hash_salt
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.step_plan import (
    L,
    PlannedSequence,
    RequestUpdate,
    SequenceResult,
    StepPlan,
)
from nanovllm.errors import InvalidRequestError, NanovllmError


class Scheduler:
    """Decides each step. `add`, `finish`, `schedule` and `commit` are called by one thread."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        """Schedule over `blocks`; at most `max_num_seqs` sequences and `max_num_batched_tokens` tokens a step."""
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.prefix_cache_queries = 0  # in tokens, as are the hits
        self.prefix_cache_hits = 0
        self._requests: dict[str, Request] = {}
        self._structured: dict[str, Request] = {}  # those of them that follow a grammar
        self._queue: list[
            tuple[tuple[int, int], Request]
        ] = []  # a heap; requests aborted while waiting stay until they come up
        self._arrivals = 0
        self._committing: list[RequestUpdate[Any]] = []  # updates of a commit that has not returned
        self._copies: dict[
            str, tuple[int, int]
        ] = {}  # those of the step that is being planned, by request id

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or no longer."""
        return len(self._requests) - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def num_deferred(self) -> int:
        """Waiting requests that wait for the mask of their grammar, not for a seat or blocks."""
        return sum(
            request.state is RequestState.WAITING and request.is_blocked
            for request in self._structured.values()
        )

    @property
    def has_blocked(self) -> bool:
        """Whether a request waits for the mask of its grammar."""
        return any(request.is_blocked for request in self._structured.values())

    def failed_grammars(self) -> list[tuple[Request, NanovllmError]]:
        """Return the requests whose grammar can be followed no further, and why."""
        found = [(request, request.grammar) for request in self._structured.values()]
        return [
            (request, grammar.error)
            for request, grammar in found
            if grammar is not None and grammar.error is not None
        ]

    @property
    def request_ids(self) -> set[str]:
        """Ids of the unfinished requests."""
        return set(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request that the input processor has checked; raises InvalidRequestError where its id is in use."""
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"the request id {request.request_id!r} is in use by an unfinished request"
            )
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.request_id] = request
        if request.grammar is not None:
            self._structured[request.request_id] = request
        heapq.heappush(self._queue, (request.order, request))

    def finish(self, request_id: str, reason: FinishReason) -> RequestUpdate[object] | None:
        """End a request in whatever state it is; None where no unfinished one has that id."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = reason
        self._finish(request)
        if (
            len(self._queue) > 2 * self.num_waiting + 64
        ):  # a burst of aborted requests behind one that waits must not pile up
            self._queue = [entry for entry in self._queue if entry[1].state is RequestState.WAITING]
            heapq.heapify(self._queue)
        return RequestUpdate(request, None, None, (), reason)

    def abort(self, request_id: str) -> RequestUpdate[object] | None:
        """End a request that nobody waits for; None where no unfinished one has that id."""
        return self.finish(request_id, FinishReason.ABORT)

    def schedule(self) -> StepPlan:
        """Plan the next step and take the blocks that it needs. An empty plan means that there is nothing to do."""
        preemptions = self.num_preemptions
        planned: dict[str, PlannedSequence] = {}
        self._copies = {}
        in_order = sorted(self.running, key=lambda request: request.order)
        for request in in_order:
            if (
                request.is_decoding
                and not request.is_blocked
                and self._make_room(request, 1, planned)
            ):
                self._plan(request, 1, planned)
        for request in in_order:
            if request.state is RequestState.RUNNING and not request.is_decoding:
                self._continue_prompt(request, planned)
        if self.num_preemptions == preemptions:
            self._admit(planned)
        self._spend_rest(planned)
        plan = StepPlan((*planned.values(), *self._forks(planned)), tuple(self._copies.values()))
        assert plan.sequences or not self._requests or self.has_blocked, (
            "work is waiting, yet nothing can run"
        )
        return plan

    def commit(
        self, plan: StepPlan, results: Iterable[SequenceResult[L]]
    ) -> list[RequestUpdate[L]]:
        """Book what a planned step computed: append tokens, finish requests, free their blocks.

        It has two phases: all tokens are appended before the first request is finished. Where it
        raises, `fail` reports each request of the plan once.
        """
        found = list(results)
        if len(found) != len(plan.sequences):
            raise ValueError(f"{len(found)} results for {len(plan.sequences)} planned sequences")
        updates: list[RequestUpdate[L]] = []
        self._committing = updates
        for sequence in plan.sequences:  # before anything ends and frees what they share
            if (
                sequence.source is not None
                and sequence.source.state is sequence.request.state is RequestState.RUNNING
            ):
                self._fork(sequence.request, sequence.source, sequence.start)
        for sequence, result in zip(plan.sequences, found, strict=True):
            request = sequence.request
            if (
                request.state is RequestState.RUNNING
                and request.num_computed_tokens == sequence.start
            ):  # otherwise it, or what it was to fork from, was aborted since it was planned
                updates.append(self._advance(sequence, result))
        unsound = [update.request for update in updates if not update.is_finite]
        distrusted = [(one, self.blocks.distrust(one.writer, one.block_ids)) for one in unsound]
        for update in updates:
            if update.finish_reason is not None:
                self._finish(update.request)
        for request, blocks in distrusted:
            self._preempt_readers(request, blocks)
        self._committing = []
        return updates

    def _advance(self, sequence: PlannedSequence, result: SequenceResult[L]) -> RequestUpdate[L]:
        """Take in what a step computed for one request, and find out whether it has ended."""
        request = sequence.request
        request.next_prompt_logprob += len(sequence.prompt_logprob_positions)
        request.next_hidden += len(sequence.hidden_positions)
        request.num_computed_tokens += sequence.count
        token_id, fault = result.token_id, None
        is_unusable = sequence.samples or result.hidden is not None
        if (sequence.samples and token_id is None) or (is_unusable and not result.is_finite):
            request.finish_reason = FinishReason.ERROR
        elif token_id is not None:
            try:
                request.append(token_id)
            except Exception as error:  # noqa: BLE001 - it ends this request and no other
                token_id, fault = None, error
                request.finish_reason, request.stop_reason = FinishReason.ERROR, None
        elif request.max_new_tokens == 0 and request.num_uncomputed_tokens == 0:
            request.finish_reason = FinishReason.LENGTH
        if result.is_finite and is_unusable:
            self._mark_proven(request)
        return RequestUpdate(
            request,
            token_id,
            result.logprobs,
            result.prompt_logprobs,
            request.finish_reason,
            result.hidden,
            result.is_finite,
            fault,
        )

    def fail(self, plan: StepPlan) -> list[RequestUpdate[Any]]:
        """Book a step that raised: its requests end with an error, and nothing cached is trusted any more.

        Those that a commit had finished before it raised are reported as it finished them.
        """
        updates = [
            update for update in self._committing if update.request.state is RequestState.FINISHED
        ]
        self._committing = []
        for sequence in plan.sequences:
            request = sequence.request
            if request.state is RequestState.RUNNING:
                request.finish_reason, request.stop_reason = FinishReason.ERROR, None
                self._finish(request)
                updates.append(RequestUpdate(request, None, None, (), FinishReason.ERROR))
        self.blocks.reset_prefix_cache()
        for request in list(
            self.running
        ):  # not planned, but it may share a block that the step was to fill
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
        others_wait = (
            self.num_waiting > 0 or sum(not other.is_decoding for other in self.running) > 1
        )
        share = max(self.max_num_batched_tokens // 2, 1) if others_wait else left
        return min(request.num_uncomputed_tokens, left, share)

    def _continue_prompt(self, request: Request, planned: dict[str, PlannedSequence]) -> None:
        if request.is_blocked or self._waits_for_group(request):
            return
        self._take_computed(request)
        self._count_prefix_hits(request)
        count = self._chunk(request, planned)
        if count > 0 and self._make_room(request, count, planned):
            self._plan(request, count, planned)

    def _plan(self, request: Request, count: int, planned: dict[str, PlannedSequence]) -> None:
        """Put a request that has its blocks into the step, and make blocks findable that will be full after it.

        Requests planned later in the same step can share them already, because every layer stores all of a batch's keys and values
        before any of its queries reads them.
        """
        sequence = planned[request.request_id] = PlannedSequence.of(request, count)
        full = (
            (sequence.start + count) // self.blocks.block_size
            if self.blocks.enable_prefix_caching
            else 0
        )
        for index in range(request.num_registered_blocks, full):
            block_hash = self._hash(request, index)
            parent = request.block_hashes[index - 1] if index else b""
            self.blocks.register(request.block_ids[index], block_hash, parent, request.writer)
        request.num_registered_blocks = max(request.num_registered_blocks, full)

    def _unplan(self, sequence: PlannedSequence) -> set[int]:
        """Take back what `_plan` made findable: it will not be computed in this step. Returns the blocks."""
        request = sequence.request
        indices = range(sequence.start // self.blocks.block_size, request.num_registered_blocks)
        for index in indices:
            self.blocks.unregister(request.block_ids[index], request.block_hashes[index])
        return {request.block_ids[index] for index in indices}

    def _admit(self, planned: dict[str, PlannedSequence]) -> None:
        """Start waiting requests, strictly in order, while there are seats, tokens and blocks for all that they are known to need.

        Those that wait for the mask of a grammar are passed over. Those that have waited for long give up their seats and blocks.
        """
        blocked = self._take_blocked()
        self._admit_unblocked(planned)
        late = sorted((one for one in self.running if one.is_late), key=lambda one: one.order)
        while late and self._queue and self._left(planned) > 0:
            self._preempt(late.pop(), planned)
            blocked |= self._take_blocked()
            self._admit_unblocked(planned)
        for request in blocked.values():
            heapq.heappush(self._queue, (request.order, request))

    def _take_blocked(self) -> dict[str, Request]:
        """Take the requests out of the queue that wait for the mask of a grammar."""
        waiting = {
            request_id: request
            for request_id, request in self._structured.items()
            if request.state is RequestState.WAITING and request.is_blocked
        }
        if waiting:
            self._queue = [entry for entry in self._queue if entry[1].request_id not in waiting]
            heapq.heapify(self._queue)
        return waiting

    def _admit_unblocked(self, planned: dict[str, PlannedSequence]) -> None:
        while self._queue and len(self.running) < self.max_num_seqs and self._left(planned) > 0:
            request = self._queue[0][1]
            if request.state is not RequestState.WAITING:
                heapq.heappop(self._queue)
                continue
            waits = self._waits_for_group(request)
            if not waits:
                self._take_computed(request)
            promised = sum(self._missing(r) for r in self.running)
            growth = len(
                self.running
            )  # a block each for those that run, so that admitting does not at once lead to preempting
            if self._missing(request) > self.blocks.num_free - promised - growth:
                self._release(request)
                return
            heapq.heappop(self._queue)
            count = self._chunk(request, planned)
            request.move_to(RequestState.RUNNING)
            self.running.append(request)
            if not waits:
                self._count_prefix_hits(request)
                if self._must_copy(request):
                    self._own_tail(request)
                self._grow(request, count)
                self._plan(request, count, planned)

    def _missing(self, request: Request) -> int:
        """Blocks that a request has yet to get for all of its known tokens; one that is to fork will need a copy of the last alone."""
        if self._waits_for_group(request):
            return 1
        return max(
            0, self.blocks.blocks_for(len(request.tokens)) - len(request.block_ids)
        ) + self._must_copy(request)

    def _spend_rest(self, planned: dict[str, PlannedSequence]) -> None:
        """Give tokens that nobody else could use to prompts whose share was limited."""
        for sequence in list(planned.values()):
            request = sequence.request
            missing = request.num_uncomputed_tokens - sequence.count
            if missing == 0:
                continue
            more = min(self._left(planned), missing)
            room = (
                (self.blocks.num_free + len(request.block_ids)) * self.blocks.block_size
                - sequence.start
                - sequence.count
            )
            more = min(more, room)
            if more > 0:
                self._grow(request, sequence.count + more)
                self._plan(request, sequence.count + more, planned)

    def _make_room(self, request: Request, count: int, planned: dict[str, PlannedSequence]) -> bool:
        """Get blocks for `count` more tokens, preempting whoever comes last; False where that is the request itself."""
        if request.state is not RequestState.RUNNING:
            return False
        blocks = self.blocks.blocks_for(request.num_computed_tokens + count)
        copies = self._must_copy(request)
        while blocks - len(request.block_ids) + copies > self.blocks.num_free:
            self._preempt(max(self.running, key=lambda other: other.order), planned)
            if request.state is not RequestState.RUNNING:
                return False
            copies = self._must_copy(
                request
            )  # not any more, where the last to share the block is gone
        if copies:
            self._own_tail(request)
        self._grow(request, count)
        return True

    def _grow(self, request: Request, count: int) -> None:
        needed = self.blocks.blocks_for(request.num_computed_tokens + count) - len(
            request.block_ids
        )
        if needed > 0:
            request.block_ids += self.blocks.allocate(needed)

    def _must_copy(self, request: Request) -> bool:
        """Whether the block that a request's next token goes to is there but not to be written to."""
        index = request.num_computed_tokens // self.blocks.block_size
        return index < len(request.block_ids) and not self.blocks.is_writable(
            request.block_ids[index]
        )

    def _own_tail(self, request: Request) -> None:
        """Put a copy in the place of a block that a request must not write to.

        Asked for when a request is first planned in a step, and not again: what it is to fill may be shared by then.
        """
        index = request.num_computed_tokens // self.blocks.block_size
        shared = request.block_ids[index]
        (own,) = self.blocks.allocate(1)
        request.block_ids[index] = own
        self.blocks.free([shared])
        self._copies[request.request_id] = (shared, own)

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

    def _mark_proven(self, request: Request) -> None:
        """Note that everything which is computed of a request has led to finite numbers."""
        full = request.num_computed_tokens // self.blocks.block_size
        for index in range(request.num_proven_blocks, full):
            self.blocks.mark_proven(request.block_ids[index])
        request.num_proven_blocks = max(request.num_proven_blocks, full)

    def _preempt_readers(self, unsound: Request, blocks: set[int]) -> None:
        """Set back whoever has read what a request computed whose numbers are not finite."""
        for other in list(self.running):
            is_reader = other.writer == unsound.writer or not blocks.isdisjoint(other.block_ids)
            if other is not unsound and is_reader and other.state is RequestState.RUNNING:
                self._preempt(other, {})

    def _finish(self, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        request.move_to(RequestState.FINISHED)
        self._release(request)
        del self._requests[request.request_id]
        self._structured.pop(request.request_id, None)

    def _release(self, request: Request) -> None:
        self.blocks.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_registered_blocks = 0
        request.num_proven_blocks = 0
        self._copies.pop(request.request_id, None)

    def _siblings(self, request: Request) -> list[Request]:
        """The running requests of its group, without itself."""
        return (
            [
                other
                for other in self.running
                if other.group == request.group and other is not request
            ]
            if request.group
            else []
        )

    def _can_fork(self, request: Request) -> bool:
        return (
            bool(request.group)
            and request.num_computed_tokens == 0
            and not request.needs_whole_prompt
        )

    def _waits_for_group(self, request: Request) -> bool:
        """Whether another of its group, and one that comes before it, is reading the prompt that they have in common."""
        if not self._can_fork(request):
            return False
        siblings = self._siblings(request)
        has_read = any(other.num_computed_tokens >= request.num_prompt_tokens for other in siblings)
        return not has_read and any(other.order < request.order for other in siblings)

    def _forks(self, planned: dict[str, PlannedSequence]) -> list[PlannedSequence]:
        """A share of the step for each request whose group has read its prompt to the end after it."""
        forks: dict[str, PlannedSequence] = {}
        for sequence in planned.values():
            reader = sequence.request
            if reader.group and sequence.samples and reader.num_output_tokens == 0:
                for other in self._siblings(reader):
                    if (
                        self._can_fork(other)
                        and other.num_output_tokens == 0
                        and other.request_id not in planned
                    ):
                        forks[other.request_id] = PlannedSequence(
                            other, reader.num_prompt_tokens, 0, True, range(0), range(0), reader
                        )
        return list(forks.values())

    def _fork(self, request: Request, source: Request, computed: int) -> None:
        """Let a request hold the blocks of the prompt that another of its group has read, of which it has `computed` tokens."""
        size = self.blocks.block_size
        request.block_ids = source.block_ids[: self.blocks.blocks_for(request.num_prompt_tokens)]
        for block in request.block_ids:
            self.blocks.share(block)
        request.num_computed_tokens = computed
        request.block_hashes = source.block_hashes[: request.num_prompt_tokens // size]
        request.num_registered_blocks = min(source.num_registered_blocks, computed // size)
        request.num_cached_tokens = request.num_cached_tokens or 0
        request.num_shared_tokens = computed

    def _take_computed(self, request: Request) -> None:
        """Take what is computed of a request's tokens already: by others of its group, all but the last of the prompt, or what can be found."""
        if self._can_fork(request) and request.num_prompt_tokens > 1:
            for other in self._siblings(request):
                has_blocks = (
                    other.request_id not in self._copies
                )  # a copy is made when the step is run, and not at all if it is taken back
                if other.num_computed_tokens >= request.num_prompt_tokens and has_blocks:
                    self._fork(request, other, request.num_prompt_tokens - 1)
                    return
        self._take_cached_blocks(request)

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
            request.block_hashes.append(
                hash_block(parent, request.tokens[done * size : (done + 1) * size])
            )
        return request.block_hashes[index]
