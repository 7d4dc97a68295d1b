"""CourseScheduler: the reader's scheduler and block manager as the scheduler of an engine.

    Request   -> Sequence      what the reader's scheduler knows: tokens, blocks, progress
    Chunk     -> PlannedSequence
    results   -> commit(chunks, sampled)

The reader's objects decide; the requests are a copy of their state, which the engine and the
inspector read. Every plan is checked (plan_check.py). A fault ends the requests concerned, and the
others begin again with a new scheduler and an empty cache.
"""

import logging
from collections.abc import Iterator, KeysView, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import (
    NO_MASKS_MISSING,
    MaskStates,
    PlannedSequence,
    SequenceUpdate,
    StepPlan,
)
from nanovllm.learn.guard import TEXT_S, Guard, ReadersFaultError, wrong
from nanovllm.learn.parts import Parts
from nanovllm.learn.plan_check import PlanCheck

logger = logging.getLogger(__name__)

_NOT_FINITE = (
    "it returned numbers that are not finite (NaN or infinity); is there a division by 0, or a "
    "logarithm of 0?"
)


class CourseBlocks(BlockManager):
    """The state of the reader's block manager, for statistics and the inspector."""

    def watch(self, manager: Any) -> None:
        """Show the state of `manager` from now on."""
        self._manager = manager
        self._held: set[int] = set()
        self._hashes: dict[int, bytes] = {}
        register = manager.register

        @wraps(register)
        def noted(block: int, block_hash: bytes) -> object:
            self._hashes[block] = block_hash
            return register(block, block_hash)

        manager.register = noted

    def update(self, running: Sequence[Request]) -> None:
        """Take over a state that was checked; `running` are the requests that hold blocks."""
        self._held = {block for request in running for block in request.block_ids}

    @property
    def num_free(self) -> int:
        """Number of blocks that no request holds."""
        return self.num_blocks - len(self._held)

    @property
    def num_used(self) -> int:
        """Number of blocks that requests hold."""
        return len(self._held)

    @property
    def cached_blocks(self) -> KeysView[int]:
        """Blocks that the reader's manager finds by the hash under which they are registered."""
        found: dict[int, None] = {}
        with suppress(Exception):  # the inspector goes on with what is known
            for block, block_hash in self._hashes.items():
                if self._manager.find(block_hash) == block:
                    found[block] = None
        return found.keys()

    @property
    def num_cached(self) -> int:
        """Number of cached blocks that no request holds."""
        return len(self.cached_blocks - self._held)

    def free(self, blocks: object) -> None:
        """Do nothing: the reader's scheduler frees blocks."""

    def check_integrity(self, held: object) -> None:
        """Do nothing: each plan was checked."""


class CourseScheduler(Scheduler):
    """Plans steps by the reader's `Scheduler` (step 9) over its `BlockManager` (step 8)."""

    def __init__(self, parts: Parts, guard: Guard, config: EngineConfig, num_blocks: int) -> None:
        """Schedule within the limits of `config`."""
        self._blocks = CourseBlocks(num_blocks, config.block_size)
        super().__init__(
            KVCacheManager(self._blocks),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._step8, self._step9 = parts["step08_blocks"], parts["step09_scheduler"]
        self._has_prefix_cache = config.enable_prefix_caching
        self._guard = guard
        self._fault: ReadersFaultError | None = None  # of a call between two steps
        self._restart()
        if self._fault is not None:
            raise self._fault

    @property
    def num_reserved_blocks(self) -> int:
        """0: the course's scheduler reserves none."""
        return 0

    def blocks_to_admit(self, request: Request) -> int:
        """Return how many blocks a waiting request needs, without a known prefix."""
        return self._blocks.blocks_for(len(request.tokens))

    def add(self, request: Request) -> None:
        """Queue a checked request; raises InvalidRequestError if its id is in use."""
        super().add(request)
        self._new.append(request)

    def schedule(self, masks: MaskStates = NO_MASKS_MISSING) -> StepPlan:
        """Plan the next step; raise ReadersFaultError, after which all requests must end."""
        try:
            if self._fault is not None:
                raise self._fault
            with self._blamed("schedule"):
                return self._next_plan()
        except ReadersFaultError:
            self._restart()
            raise

    def commit(self, plan: StepPlan, updates: Sequence[SequenceUpdate]) -> list[SequenceUpdate]:
        """Append the tokens of a step and finish requests, as the reader's scheduler does."""
        accepted: list[SequenceUpdate] = []
        self._committing = accepted
        sampled = []
        pairs = list(zip(self._chunks, plan.sequences, updates, strict=True))
        with self._blamed("commit"):
            for chunk, sequence, update in pairs:
                if chunk.samples:
                    sampled.append(update.token_ids[0] if update.token_ids else 0)
                update.apply(sequence)
                if not update.is_finite and self._guard.not_finite is not None:
                    update.cause = wrong(self._guard.not_finite, _NOT_FINITE)
                accepted.append(update)
            ended = self._call(self._scheduler.commit, self._chunks, sampled)
            self._check_ended(ended, pairs)
        is_sound = all(update.is_finite for update in accepted)
        for update in accepted:
            if update.request.finish_reason is not None:
                self._finish(update.request)
        self._committing = []
        if not is_sound:  # no cached block may have a number that is not finite
            self._restart()
        return accepted

    def fail(self, plan: StepPlan) -> list[SequenceUpdate]:
        """Finish the requests of a step that raised; the others begin again."""
        updates = [update for update in self._committing if update.request.request_id not in self]
        self._committing = []
        self._sequences.clear()
        for sequence in plan.sequences:
            request = sequence.request
            if request.request_id in self:
                request.finish_reason, request.stop_reason = FinishReason.ERROR, None
                self._finish(request)
                updates.append(SequenceUpdate(request))
        self._restart()
        return updates

    def check_integrity(self) -> None:
        """Assert that requests and their states are consistent."""
        self.queues.check_integrity(self.requests)
        for request in self.requests:
            assert (request.state is RequestState.RUNNING) == (request in self.running)
            assert request.state is RequestState.RUNNING or not request.block_ids

    def __contains__(self, request_id: str) -> bool:
        """Return whether a request is unfinished."""
        return request_id in self._requests

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self._guard.call(TEXT_S, function, *args, **kwargs)

    @contextmanager
    def _blamed(self, name: str) -> Iterator[None]:
        """Name a method of the reader's scheduler in what its wrong state raises here."""
        try:
            yield
        except ReadersFaultError:
            raise
        except Exception as error:
            method = getattr(self._scheduler, name, self._step9.Scheduler)
            raise wrong(method, f"{type(error).__name__}: {error}") from error

    def _restart(self) -> None:
        """Begin with a new scheduler and empty blocks; unfinished requests are queued again.

        If that fails, `schedule` raises the fault.
        """
        try:
            self._build()
            self._fault = None
        except ReadersFaultError as error:
            self._fault = error
        self._chunks: list[Any] = []
        self._sequences: dict[str, Any] = {}  # the reader's, by request id
        for request in list(self.running):
            self._note_preempted(request, PreemptionCause.FAILED_STEP)
        self._new = list(self.requests)

    def _build(self) -> None:
        """Make the reader's block manager and scheduler."""
        blocks, config = self._blocks, (self.max_num_batched_tokens, self.max_num_seqs)
        manager = self._call(self._step8.BlockManager, blocks.num_blocks, blocks.block_size)
        try:
            blocks.watch(manager)
            self._hide_prefixes(manager)
        except AttributeError as error:
            text = f"{error}; it must have `register` and `find_prefix`, and no __slots__"
            raise wrong(self._step8.BlockManager, text) from error
        self._scheduler = self._call(self._step9.Scheduler, manager, *config)
        for name in ("add", "finish", "schedule", "commit"):
            if not callable(getattr(self._scheduler, name, None)):
                raise wrong(self._step9.Scheduler, f"it has no method `{name}`")
        self._check = PlanCheck(
            self._scheduler, manager, blocks, max_tokens=config[0], max_sequences=config[1]
        )

    def _hide_prefixes(self, manager: Any) -> None:
        """Let `manager` find no prefix where every token of a prompt must be computed."""
        find_prefix = manager.find_prefix

        @wraps(find_prefix)
        def found(tokens: Any) -> Any:
            is_hidden = not self._has_prefix_cache or any(
                request.needs_whole_prompt and request.tokens == list(tokens)
                for request in self.requests
            )
            return [] if is_hidden else find_prefix(tokens)

        manager.find_prefix = found

    def _next_plan(self) -> StepPlan:
        new, self._new = self._new, []
        for request in new:
            sequence = self._sequences[request.request_id] = self._call(
                self._step9.Sequence,
                name=request.request_id,
                prompt=list(request.prompt_token_ids),
                # A prompt without output ends with the first token, which is dropped.
                max_new_tokens=max(request.max_new_tokens, 1),
                stop_token_ids=request.stop_token_ids,
                tokens=list(request.tokens),
            )
            self._call(self._scheduler.add, sequence)
        if not self._sequences:
            return StepPlan(())
        chunks = self._call(self._scheduler.schedule)
        pairs = {
            id(sequence): (self._requests[name], sequence)
            for name, sequence in self._sequences.items()
        }

        @wraps(self._scheduler.schedule)  # so that messages name it
        def check() -> None:
            self._check.check(chunks, pairs)

        self._call(check)
        self._chunks = list(chunks)
        self._copy_state(pairs)
        self._blocks.update(self.running)
        num_planned = sum(chunk.count for chunk in self._chunks)
        self.has_spent_budget = num_planned == self.max_num_batched_tokens
        return StepPlan(
            tuple(
                PlannedSequence.of(pairs[id(chunk.sequence)][0], chunk.count)
                for chunk in self._chunks
            )
        )

    def _copy_state(self, pairs: dict[int, tuple[Request, Any]]) -> None:
        """Copy the state of the reader's sequences to the requests."""
        keys = [id(sequence) for sequence in self._scheduler.running]
        for key, (request, sequence) in pairs.items():
            is_reset = sequence.num_computed < request.num_computed_tokens
            if request.state is RequestState.RUNNING and (key not in keys or is_reset):
                self._note_preempted(request, PreemptionCause.OWN_CHOICE)
        for key in keys:
            request, sequence = pairs[key]
            request.block_ids = [int(block) for block in sequence.block_ids]
            request.num_computed_tokens = int(sequence.num_computed)
            if request.state is RequestState.WAITING:
                self._note_admitted(request)
        self.running = [pairs[key][0] for key in keys]

    def _note_admitted(self, request: Request) -> None:
        if request.needs_whole_prompt and request.num_computed_tokens:
            text = f"{request.request_id} shares a prefix that `blocks.find_prefix` did not return"
            raise wrong(self._scheduler.schedule, text)
        self.queues.remove(request)
        request.move_to(RequestState.RUNNING)
        self.running.append(request)
        self.kv_cache.count_prefix_hits(request)
        if self.observer is not None:
            self.observer.on_admitted(request)

    def _note_preempted(self, request: Request, cause: PreemptionCause) -> None:
        if self.observer is not None:
            self.observer.on_preempted(request, cause, None)
        self.running.remove(request)
        request.move_to(RequestState.WAITING)
        self.kv_cache.free(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.queues.push(request)

    def _check_ended(
        self, ended: Any, pairs: list[tuple[Any, PlannedSequence, SequenceUpdate]]
    ) -> None:
        """Check what the reader's `commit` has done; forget the sequences that have ended."""
        if not isinstance(ended, list | tuple):
            raise wrong(
                self._scheduler.commit, f"it returned a {type(ended).__name__}, expected a list"
            )
        keys = {id(sequence) for sequence in ended}
        for chunk, planned, update in pairs:
            sequence, request = chunk.sequence, update.request
            reason = request.finish_reason
            if id(sequence) in keys:
                if reason is None:
                    text = f"{sequence.name} ended, without a stop token or its last token"
                    raise wrong(self._scheduler.commit, text)
                del self._sequences[request.request_id]
            elif reason in (FinishReason.STOP, FinishReason.LENGTH):
                raise wrong(
                    self._scheduler.commit, f"{sequence.name} should have ended ({reason.value})"
                )
            elif reason is None and list(sequence.tokens) != request.tokens:
                raise wrong(
                    self._scheduler.commit,
                    f"the tokens of {sequence.name} are not what was sampled",
                )
            elif reason is None and sequence.num_computed != planned.start + planned.count:
                text = f"{sequence.num_computed} tokens of {sequence.name} count as computed"
                raise wrong(
                    self._scheduler.commit, f"{text}, expected {planned.start + planned.count}"
                )

    def _finish(self, request: Request) -> None:
        """Finish a request, also in the reader's scheduler, if that still has it."""
        sequence = self._sequences.pop(request.request_id, None)
        if request in self._new:
            self._new.remove(request)
        super()._finish(request)
        self._blocks.update(self.running)
        if sequence is None:
            return
        try:
            self._call(self._scheduler.finish, sequence)
        except ReadersFaultError as error:
            if not self._requests:
                logger.error("the reader's scheduler failed", exc_info=error)
                self._restart()
            else:
                self._fault = error
