"""Scheduling policy: which requests run in the next step, and how many tokens of each.

Every step has one token budget. Decoding requests come first, with one token each. Then prompts are
computed in the order, in chunks that fit the remaining budget (Sarathi-Serve, Agrawal et al. 2024,
arXiv:2403.02310); those that wait are admitted in the same order. When no block is free, the
running request that is last in the order is preempted: its blocks are freed, and it is recomputed
later. The first request in the order therefore always makes progress. Since every accepted request
could run alone, all of them finish.

The order is (priority, arrival), and under the policy "fair" before that the service that a
request's client has received (fairness.py). A client that waits while another one is far ahead of
it then takes the place of a request of that client.

The scheduler uses no arrays, clock, threads or I/O, so tests need only integers. The block tables
are managed by kv_cache_manager.py, the n choices of one prompt by siblings.py.
"""

from collections.abc import Collection, Sequence

from nanovllm.engine.scheduling.fairness import (
    OUTPUT_COST,
    PROMPT_COST,
    ClientQueues,
    WaitingOrder,
    cost_of,
    recompute_cost,
)
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.leftover_budget import extend_chunks, verify_drafted
from nanovllm.engine.scheduling.observer import PreemptionCause, SchedulerObserver
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.siblings import Siblings
from nanovllm.engine.scheduling.step_plan import (
    NO_MASKS_MISSING,
    MaskStates,
    PlannedSequence,
    SequenceUpdate,
    StepBuilder,
    StepPlan,
)
from nanovllm.errors import InvalidRequestError


class Scheduler:
    """Plans each step and commits its results. For one thread."""

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        is_fair: bool = False,
    ) -> None:
        """Schedule up to `max_num_seqs` sequences and `max_num_batched_tokens` tokens per step.

        `is_fair` shares the service equally among the clients that need more than they get.
        """
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Request] = []
        self.siblings = Siblings()
        self.queues = ClientQueues(is_fair=is_fair)
        self.num_preemptions = 0
        self.observer: SchedulerObserver | None = None
        self.has_spent_budget = False  # the last step had no token left for a waiting request
        self._requests: dict[str, Request] = {}
        self._num_arrivals = 0
        self._committing: list[SequenceUpdate] = []  # updates of a commit that has not returned

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

        These are the blocks for their known tokens (a fork needs one, for copy-on-write), and one
        more for each: admission should rarely cause preemption.
        """
        return len(self.running) + sum(
            1 if self.siblings.must_wait(request) else self.kv_cache.blocks_needed(request)
            for request in self.running
        )

    def add(self, request: Request) -> None:
        """Queue a checked request; raises InvalidRequestError if its id is in use."""
        if request.request_id in self._requests:
            raise InvalidRequestError(
                f"the request id {request.request_id!r} is in use by an unfinished request"
            )
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self.queues.add(request)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """Finish a waiting or running request and return it; None if there is none with that id."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        request.finish_reason = reason
        self._finish(request)
        return request

    def schedule(self, masks: MaskStates = NO_MASKS_MISSING) -> StepPlan:
        """Plan the next step and allocate its blocks; the plan is empty if no request can run."""
        waiting = self.queues.in_order(masks.blocked)
        in_order = sorted(self.running, key=self.queues.key)
        decoding = [request for request in in_order if request.is_decoding]
        prompts = [request for request in in_order if not request.is_decoding]
        step = StepBuilder(self.max_num_batched_tokens, len(prompts))
        self.kv_cache.begin_step()
        self._take_place(in_order, waiting, step)
        for request in decoding:
            if request.request_id not in masks.blocked and self._allocate_slots(request, 1, step):
                self._plan(request, 1, step)
        for request in prompts:
            if request.request_id not in masks.blocked and request.state is RequestState.RUNNING:
                self._admit(waiting, step, before=request)
                self._continue_prompt(request, step)
        self._admit(waiting, step)
        self._preempt_late(in_order, waiting, step, masks)
        self.has_spent_budget = waiting.head is not None and step.tokens_left == 0
        extend_chunks(step, self.kv_cache)
        verify_drafted(step, self.kv_cache)
        forks = self.siblings.forks(step.sequences)
        plan = StepPlan((*step.sequences.values(), *forks), self.kv_cache.copies)
        assert plan.sequences or not self._requests or masks.blocked, (
            "requests are unfinished, but none can run"
        )
        for request, cost in (*step.debts, *((s.request, cost_of(s)) for s in plan.sequences)):
            self.queues.charge(request, cost)
        return plan

    def commit(self, plan: StepPlan, updates: Sequence[SequenceUpdate]) -> list[SequenceUpdate]:
        """Append the tokens of a step, finish requests and free their blocks.

        `updates` has the results of each planned sequence. Returns those of the requests that were
        still running, with the tokens that were appended. `Request.finish_reason` is set for those
        that have ended. All tokens are appended before the first request is finished, so that
        `fail` can report each request exactly once if this method raises.
        """
        if len(updates) != len(plan.sequences):
            raise ValueError(f"{len(updates)} updates for {len(plan.sequences)} planned sequences")
        accepted: list[SequenceUpdate] = []
        self._committing = accepted
        for sequence in plan.sequences:  # before a source ends and frees the shared blocks
            if (
                sequence.source is not None
                and sequence.source.state is sequence.request.state is RequestState.RUNNING
            ):
                self.kv_cache.fork(sequence.request, sequence.source, sequence.start)
        for sequence, update in zip(plan.sequences, updates, strict=True):
            request = sequence.request
            # False if the request, or the source of its fork, was aborted after it was planned.
            is_current = request.num_computed_tokens == sequence.start
            if request.state is RequestState.RUNNING and is_current:
                update.apply(sequence)
                accepted.append(update)
                self.siblings.update(request)
                if len(update.token_ids) > 1:  # the plan is charged for one token
                    self.queues.charge(request, OUTPUT_COST * (len(update.token_ids) - 1))
                if sequence.drafted and update.is_finite:
                    self.kv_cache.cache_blocks(request, request.num_computed_tokens)
                if update.is_finite and (sequence.samples or update.hidden is not None):
                    self.kv_cache.mark_finite(request)
        not_finite = [update.request for update in accepted if not update.is_finite]
        invalidated = [(request, self.kv_cache.invalidate(request)) for request in not_finite]
        for update in accepted:
            if update.request.finish_reason is not None:
                self._finish(update.request)
        for request, blocks in invalidated:
            self._preempt_readers(request, blocks)
        self._committing = []
        return accepted

    def fail(self, plan: StepPlan) -> list[SequenceUpdate]:
        """Finish the requests of a step that raised, and reset the prefix cache.

        Requests that `commit` finished before it raised keep their results. All other running
        requests are preempted.
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
                updates.append(SequenceUpdate(request))
        self.kv_cache.blocks.reset_prefix_cache()
        for request in list(self.running):  # they may share blocks that the step did not fill
            self._preempt(request, None, PreemptionCause.FAILED_STEP)
        return updates

    def check_integrity(self) -> None:
        """Assert that requests, their states and their blocks are consistent."""
        self.kv_cache.check_integrity(self._requests.values())
        self.siblings.check_integrity(self.running)
        self.queues.check_integrity(self._requests.values())
        assert {request.request_id for request in self.running} <= self._requests.keys()
        for request in self._requests.values():
            assert (request.state is RequestState.RUNNING) == (request in self.running)
            assert request.state is not RequestState.FINISHED
            assert request.state is RequestState.RUNNING or not request.block_ids

    def _continue_prompt(self, request: Request, step: StepBuilder) -> None:
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
        count = step.chunk_size(request, self.num_waiting)
        if count > 0 and self._allocate_slots(request, count, step):
            self._plan(request, count, step)

    def _plan(self, request: Request, count: int, step: StepBuilder) -> None:
        """Add a request with allocated blocks to the plan."""
        step.put(PlannedSequence.of(request, count))
        self.kv_cache.cache_blocks(request, request.num_computed_tokens + count)

    def _admit(
        self, waiting: WaitingOrder, step: StepBuilder, before: Request | None = None
    ) -> None:
        """Admit waiting requests, strictly in order, while slots, budget and blocks suffice.

        Only those that come before `before` in the order, if it is given.
        """
        num_reserved = -1
        while (request := waiting.head) is not None and not step.is_full:
            if step.tokens_left == 0 or len(self.running) >= self.max_num_seqs:
                return
            if before is not None and self.queues.key(before) < self.queues.key(request):
                return
            if num_reserved < 0:
                num_reserved = self.num_reserved_blocks
            must_wait = self.siblings.must_wait(request)
            needed = 1
            if not must_wait:
                self.kv_cache.take_computed(request, self.siblings.readers(request))
                needed = self.kv_cache.blocks_needed(request)
            if needed > self.kv_cache.blocks.num_free - num_reserved:
                self.kv_cache.free(request)
                step.is_full = True
                return
            waiting.take()
            self.queues.remove(request)
            count = 0 if must_wait else step.chunk_size(request, self.num_waiting)
            request.move_to(RequestState.RUNNING)
            self.running.append(request)
            self.siblings.add(request)
            if self.observer is not None:
                self.observer.on_admitted(request)
            if not must_wait:
                self.kv_cache.count_prefix_hits(request)
                has_slots = self.kv_cache.allocate_slots(request, count)
                assert has_slots, "the blocks of all known tokens were counted before"
                self._plan(request, count, step)
                needed = self.kv_cache.blocks_needed(request)
            num_reserved += needed + 1

    def _preempt_late(
        self,
        in_order: Sequence[Request],
        waiting: WaitingOrder,
        step: StepBuilder,
        masks: MaskStates,
    ) -> None:
        """Preempt running requests whose mask is late, the last first, while others wait."""
        for request in reversed(in_order):
            if waiting.head is None or step.tokens_left == 0 or step.has_evicted:
                return
            if request.request_id in masks.late and request.state is RequestState.RUNNING:
                self._preempt(request, step, PreemptionCause.LATE_MASK)
                step.is_full = False
                self._admit(waiting, step)

    def _take_place(
        self, in_order: Sequence[Request], waiting: WaitingOrder, step: StepBuilder
    ) -> None:
        """Preempt a running request of a client far ahead for the first waiting one, if it needs.

        See `ClientQueues.find_victim`. The lead is at least the cost of a full step.
        """
        head, lead = waiting.head, self.max_num_batched_tokens * PROMPT_COST
        if head is None or not in_order or self.queues.lead(in_order[-1], head) < lead:
            return
        needed = self.blocks_to_admit(head)
        has_blocks = needed <= self.kv_cache.blocks.num_free - self.num_reserved_blocks
        needs_slot = len(in_order) >= self.max_num_seqs
        if has_blocks and not needs_slot:
            return
        victim = self.queues.find_victim(
            in_order, head, lead, needs_slot=needs_slot, num_blocks=0 if has_blocks else needed
        )
        if victim is not None:
            step.debts.append((head, recompute_cost(victim)))
            self._preempt(victim, step, PreemptionCause.FAIR_SHARE, head)

    def blocks_to_admit(self, request: Request) -> int:
        """Return how many free blocks the admission of a waiting request needs now."""
        if self.siblings.must_wait(request):
            return 1
        return self.kv_cache.free_blocks_needed(request, self.siblings.readers(request))

    def _allocate_slots(self, request: Request, count: int, step: StepBuilder) -> bool:
        """Allocate blocks for `count` tokens, preempting the last requests in order if necessary.

        Returns False if the request itself was preempted.
        """
        while request.state is RequestState.RUNNING:
            if self.kv_cache.allocate_slots(request, count):
                return True
            step.is_full = step.has_evicted = True
            last = max(self.running, key=self.queues.key)
            self._preempt(last, step, PreemptionCause.NO_FREE_BLOCK, request)
        return False

    def _preempt(
        self,
        request: Request,
        step: StepBuilder | None,
        cause: PreemptionCause,
        other: Request | None = None,
    ) -> None:
        """Free a request's blocks and queue it again; `cause` and `other` are for the observer.

        Other requests that share a block which this request would have filled in this step are
        preempted too. `step` is the one that is being planned, if any.
        """
        if self.observer is not None:
            self.observer.on_preempted(request, cause, other)
        sequence = None if step is None else step.remove(request)
        start = None if sequence is None else sequence.start
        never_filled = set() if start is None else self.kv_cache.uncache_blocks(request, start)
        self.running.remove(request)
        self.siblings.remove(request)
        request.move_to(RequestState.WAITING)
        request.num_paid_tokens = max(request.num_paid_tokens, request.num_computed_tokens)
        self.kv_cache.free(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.queues.push(request)
        for reader in list(self.running) if never_filled else ():
            is_running = reader.state is RequestState.RUNNING
            if is_running and not never_filled.isdisjoint(reader.block_ids):
                self._preempt(reader, step, PreemptionCause.UNFILLED_BLOCK, request)

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
        else:
            self.queues.remove(request)
        self.queues.finish(request)
        request.move_to(RequestState.FINISHED)
        if self.observer is not None:
            self.observer.on_finished(request)
        self.kv_cache.free(request)
        del self._requests[request.request_id]
