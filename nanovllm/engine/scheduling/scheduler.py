"""Scheduling policy: which requests run in the next step, and how many tokens of each.

Every step has one token budget. Decoding requests come first, with one token each. Then running
prompts are computed in (priority, arrival) order, in chunks that fit the remaining budget
(Sarathi-Serve, Agrawal et al. 2024, arXiv:2403.02310). Waiting requests are admitted last, in the
same order. When no block is free, the running request that is last in that order is preempted: its
blocks are freed, and it is recomputed later. The first request in the order therefore always makes
progress. Since every accepted request could run alone, all of them finish.

The scheduler uses no arrays, clock, threads or I/O, so tests need only integers. The block tables
are managed by kv_cache_manager.py, the n choices of one prompt by siblings.py.
"""

import heapq
from collections.abc import Collection, Iterable

from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.observer import PreemptionCause, SchedulerObserver
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.siblings import Siblings
from nanovllm.engine.scheduling.step_plan import (
    NO_MASKS_MISSING,
    MaskStates,
    PlannedSequence,
    SequenceResult,
    StepDraft,
    StepPlan,
    apply_result,
)
from nanovllm.errors import InvalidRequestError


class Scheduler:
    """Plans each step and commits its results. For one thread."""

    def __init__(
        self, kv_cache: KVCacheManager, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        """Schedule up to `max_num_seqs` sequences and `max_num_batched_tokens` tokens per step."""
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Request] = []
        self.siblings = Siblings()
        self.num_preemptions = 0
        self.observer: SchedulerObserver | None = None
        self._requests: dict[str, Request] = {}
        # A heap. Requests that were aborted while waiting stay in it until they reach the top.
        self._queue: list[tuple[tuple[int, int], Request]] = []
        self._num_arrivals = 0
        self._committing: list[SequenceResult] = []  # results of a commit that has not returned

    @property
    def num_waiting(self) -> int:
        """Number of unfinished requests that are not running: not admitted yet, or preempted."""
        return len(self._requests) - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def requests(self) -> Collection[Request]:
        """The unfinished requests."""
        return self._requests.values()

    @property
    def request_ids(self) -> set[str]:
        """Ids of the unfinished requests."""
        return set(self._requests)

    @property
    def num_reserved_blocks(self) -> int:
        """Number of free blocks that admission leaves to the running requests.

        These are the blocks for their known tokens, and one more for each: admission should rarely
        cause preemption.
        """
        return sum(map(self._blocks_needed, self.running)) + len(self.running)

    def add(self, request: Request) -> None:
        """Queue a checked request; raises InvalidRequestError if its id is in use."""
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"the request id {request.request_id!r} is in use by an unfinished request"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        heapq.heappush(self._queue, (request.sort_key, request))

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """Finish a waiting or running request and return it; None if there is none with that id."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = reason
        self._finish(request)
        # Requests that are aborted while another one waits must not accumulate in the heap.
        if len(self._queue) > 2 * self.num_waiting + 64:
            self._queue = [entry for entry in self._queue if entry[1].state is RequestState.WAITING]
            heapq.heapify(self._queue)
        return request

    def schedule(self, masks: MaskStates = NO_MASKS_MISSING) -> StepPlan:
        """Plan the next step and allocate its blocks; the plan is empty if no request can run."""
        preemptions = self.num_preemptions
        num_prompts = sum(not request.is_decoding for request in self.running)
        draft = StepDraft(self.max_num_batched_tokens, num_prompts)
        self.kv_cache.begin_step()
        in_order = sorted(self.running, key=_sort_key)
        for request in in_order:
            is_ready = request.is_decoding and request.request_id not in masks.blocked
            if is_ready and self._allocate_slots(request, 1, draft):
                self._plan(request, 1, draft)
        for request in in_order:
            is_ready = not request.is_decoding and request.request_id not in masks.blocked
            if is_ready and request.state is RequestState.RUNNING:
                self._continue_prompt(request, draft)
        if self.num_preemptions == preemptions:
            self._admit(draft, masks)
        self._use_leftover_budget(draft)
        sequences = draft.sequences
        forks = self.siblings.forks(sequences)
        plan = StepPlan((*sequences.values(), *forks), self.kv_cache.copies)
        assert plan.sequences or not self._requests or masks.blocked, (
            "requests are unfinished, but none can run"
        )
        return plan

    def commit(self, plan: StepPlan, results: Iterable[SequenceResult]) -> list[SequenceResult]:
        """Append the tokens of a step, finish requests and free their blocks.

        Returns the results of the requests that were still running, with the tokens that were
        appended. `Request.finish_reason` is set for those that have ended. All tokens are appended
        before the first request is finished, so that `fail` can report each request exactly once if
        this method raises.
        """
        results = list(results)
        if len(results) != len(plan.sequences):
            raise ValueError(f"{len(results)} results for {len(plan.sequences)} planned sequences")
        accepted: list[SequenceResult] = []
        self._committing = accepted
        for sequence in plan.sequences:  # before a source ends and frees the shared blocks
            if (
                sequence.source is not None
                and sequence.source.state is sequence.request.state is RequestState.RUNNING
            ):
                self.kv_cache.fork(sequence.request, sequence.source, sequence.start)
        for sequence, result in zip(plan.sequences, results, strict=True):
            request = sequence.request
            # False if the request, or the source of its fork, was aborted after it was planned.
            is_current = request.num_computed_tokens == sequence.start
            if request.state is RequestState.RUNNING and is_current:
                accepted.append(apply_result(sequence, result))
                self.siblings.update(request)
                if result.is_finite and (sequence.samples or result.hidden is not None):
                    self.kv_cache.mark_finite(request)
        not_finite = [result.request for result in accepted if not result.is_finite]
        invalidated = [(request, self.kv_cache.invalidate(request)) for request in not_finite]
        for result in accepted:
            if result.request.finish_reason is not None:
                self._finish(result.request)
        for request, blocks in invalidated:
            self._preempt_readers(request, blocks)
        self._committing = []
        return accepted

    def fail(self, plan: StepPlan) -> list[SequenceResult]:
        """Finish the requests of a step that raised, and reset the prefix cache.

        Requests that `commit` finished before it raised keep their results. All other running
        requests are preempted.
        """
        results = [
            result for result in self._committing if result.request.state is RequestState.FINISHED
        ]
        self._committing = []
        for sequence in plan.sequences:
            request = sequence.request
            if request.state is RequestState.RUNNING:
                request.finish_reason, request.stop_reason = FinishReason.ERROR, None
                self._finish(request)
                results.append(SequenceResult(request))
        self.kv_cache.blocks.reset_prefix_cache()
        for request in list(self.running):  # they may share blocks that the step did not fill
            self._preempt(request, None, PreemptionCause.FAILED_STEP)
        return results

    def check_integrity(self) -> None:
        """Assert that requests, their states and their blocks are consistent."""
        self.kv_cache.check_integrity(self._requests.values())
        self.siblings.check_integrity(self.running)
        assert {request.request_id for request in self.running} <= self._requests.keys()
        for request in self._requests.values():
            assert (request.state is RequestState.RUNNING) == (request in self.running)
            assert request.state is not RequestState.FINISHED
            assert request.state is RequestState.RUNNING or not request.block_ids

    def _chunk_size(self, request: Request, draft: StepDraft) -> int:
        """Return the chunk size of a prompt: at most half of the budget if other prompts wait."""
        left = draft.tokens_left
        others_wait = self.num_waiting > 0 or draft.num_prompts > 1
        limit = max(self.max_num_batched_tokens // 2, 1) if others_wait else left
        return min(request.num_uncomputed_tokens, left, limit)

    def _continue_prompt(self, request: Request, draft: StepDraft) -> None:
        """Plan the next chunk of a running request's prompt."""
        if self.siblings.must_wait(request):
            return
        num_computed_tokens = request.num_computed_tokens
        self.kv_cache.take_computed(request, self.siblings.readers(request))
        self.kv_cache.count_prefix_hits(request)
        num_reused_tokens = request.num_computed_tokens - num_computed_tokens
        if self.observer is not None and num_reused_tokens:
            self.observer.on_reused(request, num_reused_tokens)
        self.siblings.update(request)
        count = self._chunk_size(request, draft)
        if count > 0 and self._allocate_slots(request, count, draft):
            self._plan(request, count, draft)

    def _plan(self, request: Request, count: int, draft: StepDraft) -> None:
        """Add a request with allocated blocks to the plan."""
        draft.put(PlannedSequence.of(request, count))
        self.kv_cache.cache_blocks(request, request.num_computed_tokens + count)

    def _admit(self, draft: StepDraft, masks: MaskStates) -> None:
        """Admit waiting requests in order, except those that wait for the mask of a grammar.

        While others wait, running requests whose mask is late are preempted.
        """
        blocked = self._remove_blocked(masks)
        self._admit_unblocked(draft)
        late = sorted((r for r in self.running if r.request_id in masks.late), key=_sort_key)
        while late and self._queue and draft.tokens_left > 0:
            self._preempt(late.pop(), draft, PreemptionCause.LATE_MASK)
            blocked += self._remove_blocked(masks)
            self._admit_unblocked(draft)
        for request in blocked:
            heapq.heappush(self._queue, (request.sort_key, request))

    def _remove_blocked(self, masks: MaskStates) -> list[Request]:
        """Remove and return the queued requests that wait for the mask of a grammar."""
        if not masks.blocked:
            return []
        blocked = [r for _, r in self._queue if r.request_id in masks.blocked]
        self._queue = [entry for entry in self._queue if entry[1].request_id not in masks.blocked]
        heapq.heapify(self._queue)
        return blocked

    def _admit_unblocked(self, draft: StepDraft) -> None:
        """Admit requests from the queue, strictly in order, while budget and blocks suffice."""
        num_reserved = self.num_reserved_blocks
        while self._queue and len(self.running) < self.max_num_seqs and draft.tokens_left > 0:
            request = self._queue[0][1]
            if request.state is not RequestState.WAITING:
                heapq.heappop(self._queue)
                continue
            is_waiting = self.siblings.must_wait(request)
            if not is_waiting:
                self.kv_cache.take_computed(request, self.siblings.readers(request))
            if self._blocks_needed(request) > self.kv_cache.blocks.num_free - num_reserved:
                self.kv_cache.free(request)
                return
            heapq.heappop(self._queue)
            count = self._chunk_size(request, draft)
            request.move_to(RequestState.RUNNING)
            self.running.append(request)
            self.siblings.add(request)
            if self.observer is not None:
                self.observer.on_admitted(request)
            if not is_waiting:
                self.kv_cache.count_prefix_hits(request)
                has_slots = self.kv_cache.allocate_slots(request, count)
                assert has_slots, "the blocks of all known tokens were counted before"
                self._plan(request, count, draft)
            num_reserved += self._blocks_needed(request) + 1

    def _blocks_needed(self, request: Request) -> int:
        """Return how many more blocks a request needs; a fork needs one, for copy-on-write."""
        return 1 if self.siblings.must_wait(request) else self.kv_cache.blocks_needed(request)

    def blocks_to_admit(self, request: Request) -> int:
        """Return how many free blocks the admission of a waiting request needs now."""
        if self.siblings.must_wait(request):
            return 1
        return self.kv_cache.free_blocks_needed(request, self.siblings.readers(request))

    def _use_leftover_budget(self, draft: StepDraft) -> None:
        """Extend chunks that were limited, with the budget that no other request uses."""
        for sequence in list(draft.sequences.values()):
            request, count = sequence.request, sequence.count
            missing = request.num_uncomputed_tokens - count
            if missing == 0:
                continue
            room = self.kv_cache.max_tokens(request) - sequence.start - count
            more = min(draft.tokens_left, missing, room)
            if more > 0:
                self.kv_cache.extend_slots(request, count + more)
                self._plan(request, count + more, draft)

    def _allocate_slots(self, request: Request, count: int, draft: StepDraft) -> bool:
        """Allocate blocks for `count` tokens, preempting the last requests in order if necessary.

        Returns False if the request itself was preempted.
        """
        while request.state is RequestState.RUNNING:
            if self.kv_cache.allocate_slots(request, count):
                return True
            last = max(self.running, key=_sort_key)
            self._preempt(last, draft, PreemptionCause.NO_FREE_BLOCK, request)
        return False

    def _preempt(
        self,
        request: Request,
        draft: StepDraft | None,
        cause: PreemptionCause,
        other: Request | None = None,
    ) -> None:
        """Free a request's blocks and queue it again; `cause` and `other` are for the observer.

        Other requests that share a block which this request would have filled in this step are
        preempted too. `draft` is the step that is being planned, if any.
        """
        if self.observer is not None:
            self.observer.on_preempted(request, cause, other)
        sequence = None if draft is None else draft.remove(request)
        never_filled: set[int] = set()
        if sequence is not None:
            never_filled = self.kv_cache.uncache_blocks(request, sequence.start)
        self.running.remove(request)
        self.siblings.remove(request)
        request.move_to(RequestState.WAITING)
        self.kv_cache.free(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        heapq.heappush(self._queue, (request.sort_key, request))
        for reader in list(self.running) if never_filled else ():
            is_running = reader.state is RequestState.RUNNING
            if is_running and not never_filled.isdisjoint(reader.block_ids):
                self._preempt(reader, draft, PreemptionCause.UNFILLED_BLOCK, request)

    def _preempt_readers(self, source: Request, blocks: set[int]) -> None:
        """Preempt the requests that hold any of `blocks`, and the siblings of `source`."""
        for other in list(self.running):
            is_reader = other.writer == source.writer or not blocks.isdisjoint(other.block_ids)
            if other is not source and is_reader and other.state is RequestState.RUNNING:
                self._preempt(other, None, PreemptionCause.NOT_FINITE, source)

    def _finish(self, request: Request) -> None:
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self.siblings.remove(request)
        request.move_to(RequestState.FINISHED)
        if self.observer is not None:
            self.observer.on_finished(request)
        self.kv_cache.free(request)
        del self._requests[request.request_id]


def _sort_key(request: Request) -> tuple[int, int]:
    return request.sort_key
