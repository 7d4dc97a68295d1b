"""Engine: a scheduler, a KV cache and a model runner, run step by step.

    plan    = scheduler.schedule()          sequences, tokens of each, blocks and copies
    arrays  = batching.build(plan)          flat arrays, no padding
    output  = runner.run(*arrays)           forward pass, then sampling
    updates = scheduler.commit(plan, ...)   append tokens, finish requests, free blocks

One thread uses an engine. Other threads may use its `input_processor` and `tokenizer`.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from nanovllm.config import EngineConfig
from nanovllm.engine.engine_parts import OWN_PARTS, EngineParts
from nanovllm.engine.generation_defaults import SamplingDefaults, load_sampling_defaults
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.loading import (
    check_draft_model,
    load_draft_model,
    load_options,
    make_speculator,
    max_model_len,
    with_stored_dtype,
)
from nanovllm.engine.memory import allocate_cache, check_sizes, plan_memory
from nanovllm.engine.metrics import DraftCounts, EngineSnapshot, StepStats, TokenCounts
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.scheduling import batching
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.step_plan import (
    NO_MASKS_MISSING,
    MaskStates,
    SequenceUpdate,
    StepPlan,
)
from nanovllm.engine.step_output import StepOutput, step_stats
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.engine.update_router import UpdateRouter
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError
from nanovllm.model.families.registry import load_config
from nanovllm.model.machine import MemoryLimit
from nanovllm.model.machine import memory_limit as process_memory_limit
from nanovllm.runner.native_model_runner import NativeModelRunner
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_BLOCKED_WAIT_S = 0.002
"""Maximum wait for masks if no request can run; commands to the engine wait as long."""
_MASK_GRACE = 0.25
"""Maximum wait of a step for masks in progress, as a fraction of the last step's time."""
_MIN_MASK_GRACE_S, _MAX_MASK_GRACE_S = 0.0003, 0.002
_NO_DRAFTS = DraftCounts.begin(None)
_STEP_FAILED = "a step of the engine failed; the log has the reason"
_ALL_FORBIDDEN = (
    "every token is forbidden by the request's settings together, so none can come next; "
    "loosen one of them"
)
_NOT_A_NUMBER = "the network's output is not a number; is the checkpoint sound?"


class Engine:
    """Runs the requests of one model."""

    def __init__(
        self,
        config: EngineConfig,
        runner: NativeModelRunner,
        tokenizer: Tokenizer,
        sampling_defaults: SamplingDefaults | None = None,
        memory_limit: MemoryLimit | None = None,
        parts: EngineParts = OWN_PARTS,
        draft: NativeModelRunner | None = None,
    ) -> None:
        """Allocate the KV cache, and that of the draft model `draft`.

        Raises ValueError if the settings do not fit the model or the memory, whose limit is by
        default that of this process. The runner has the backend of `parts`.
        """
        model = runner.config
        self.config = config
        self.parts = parts
        self.model = model
        self.max_model_len = max_model_len(config, model)
        self.tokenizer = tokenizer
        self.sampling_defaults: SamplingDefaults = sampling_defaults or {}
        self.runner = runner
        backends = [runner.backend] if draft is None else [runner.backend, draft.backend]
        self.memory = plan_memory(
            config, backends, self.max_model_len, memory_limit or process_memory_limit()
        )
        num_blocks = allocate_cache(self.memory.num_blocks, config.block_size, backends)
        self.scheduler = parts.make_scheduler(config, num_blocks)
        self.speculator = make_speculator(config, runner, draft, self.scheduler.kv_cache)
        self.blocks = self.scheduler.kv_cache.blocks
        limits = Limits(
            self.max_model_len,
            self.cache_tokens,
            config.max_logprobs,
            has_priorities=config.scheduling_policy == "priority",
        )
        self.input_processor = parts.input_processor(model, tokenizer, limits, seed=config.seed)
        self._counts = TokenCounts()
        self._deadlines: dict[str, float] = {}  # of the sequences that have one, by id
        self._structured: dict[str, Request] = {}  # the sequences that have a grammar, by id
        self._masks = NO_MASKS_MISSING  # as of the last step
        self._last_step_s = 0.0
        self.started_s = time.monotonic()
        self.num_steps = 0

    @classmethod
    def load(
        cls, folder: Path, config: EngineConfig | None = None, parts: EngineParts = OWN_PARTS
    ) -> "Engine":
        """Load a model folder.

        Raises CheckpointError if the folder is not valid, and ValueError if the settings do not fit
        the model.
        """
        config = config or EngineConfig()
        cls.check(folder, config)
        tokenizer = Tokenizer.load(folder)
        config = with_stored_dtype(config, folder)
        options = load_options(config)
        if parts.backend is None:
            runner = NativeModelRunner.load(folder, config.backend, options)
        else:
            runner = NativeModelRunner(parts.backend(folder, options))
        draft = load_draft_model(config, runner.backend)
        defaults = load_sampling_defaults(folder)
        return cls(config, runner, tokenizer, defaults, parts=parts, draft=draft)

    @staticmethod
    def check(folder: Path, config: EngineConfig, *, is_local: bool = True) -> None:
        """Raise those errors of `load` that need no weights.

        The memory of this process counts only if the engine `is_local`, to be loaded here.
        """
        model = load_config(folder)
        max_model_len(config, model)
        draft = check_draft_model(config, model, folder)
        if is_local:
            check_sizes(config, model, process_memory_limit(), draft)
        load_sampling_defaults(folder)

    @property
    def cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""
        return self.blocks.num_blocks * self.blocks.block_size

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def stats(self) -> EngineSnapshot:
        """Return a snapshot of the statistics. Call it on the engine's thread; any may read it."""
        scheduler = self.scheduler
        deferred = map(self._structured.get, self._masks.blocked)
        drafts = _NO_DRAFTS if self.speculator is None else self.speculator.counts
        return EngineSnapshot(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=scheduler.num_waiting,
            num_requests_deferred=sum(
                request is not None and request.state is RequestState.WAITING
                for request in deferred
            ),
            kv_cache_usage=self.blocks.usage,
            prompt_tokens=self._counts.prompt,
            prompt_tokens_cached=self._counts.prompt_cached,
            prompt_tokens_computed=self._counts.prompt_computed,
            generation_tokens=self._counts.generated,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.kv_cache.prefix_cache_queries,
            prefix_cache_hits=scheduler.kv_cache.prefix_cache_hits,
            **drafts.fields(),
        )

    def add_request(
        self, request: Request, arrival_s: float | None = None, deadline_s: float | None = None
    ) -> None:
        """Queue a sequence; raises InvalidRequestError if its id is in use.

        Args:
            request: a sequence that the input processor has prepared.
            arrival_s: arrival of its request, by `time.monotonic()`; by default now.
            deadline_s: time at which it is aborted. No update reports this, because the caller has
                its own timer.
        """
        self.scheduler.add(request)
        request.times.arrival_s = time.monotonic() if arrival_s is None else arrival_s
        if deadline_s is not None:
            self._deadlines[request.request_id] = deadline_s
        if request.grammar is not None:
            self._structured[request.request_id] = request
            request.grammar.open()

    def mask_states(self) -> MaskStates:
        """Return which masks of unfinished sequences are missing now."""
        return MaskStates.read(self._structured.values(), time.monotonic())

    def finish_request(self, request_id: str, reason: FinishReason) -> SequenceUpdate | None:
        """Finish a waiting or running sequence; return None if there is none with that id.

        The reason is STOP if the text contains a stop string, which only the caller can detect.
        """
        request = self.scheduler.finish(request_id, reason)
        if request is None:
            return None
        self._forget(request)
        return SequenceUpdate(request, finish_reason=reason, time_s=time.monotonic())

    def step(self, on_planned: Callable[[], None] | None = None) -> StepOutput:
        """Run one step if any request can run; call `on_planned` before the forward pass."""
        started = time.monotonic()
        self._abort_overdue(started)
        failed = self._read_masks()
        if self.speculator is not None:
            self.speculator.choose(self.scheduler.running)
        try:
            plan = self.scheduler.schedule(self._masks)
        except EngineFaultError as error:
            return self._fail_all(failed, error)
        if not plan.sequences:
            if self._masks.blocked and not failed:
                self.input_processor.grammars.wait(_BLOCKED_WAIT_S)
            return StepOutput(failed, StepStats(0, 0, 0, 0.0))
        if on_planned is not None:
            on_planned()
        for sequence in plan.sequences:
            times = sequence.request.times
            if times.first_scheduled_s is None:
                times.first_scheduled_s = started
        plan, updates, fault = self._compute(plan)
        for cause in filter(None, (fault, *(update.cause for update in updates))):
            logger.error("a step failed; its requests end with an error", exc_info=cause)
        now = time.monotonic()
        stats = step_stats(plan, updates, now - started)
        self._last_step_s = stats.duration_s
        self.num_steps += 1
        if self.scheduler.observer is not None:
            self.scheduler.observer.on_step(plan, stats, started)
        self._counts.prompt_computed += stats.num_prompt_tokens
        for update in updates:
            self._complete(update, now, fault)
        return StepOutput((*failed, *updates), stats, fault)

    def _fail_all(self, failed: tuple[SequenceUpdate, ...], fault: EngineFaultError) -> StepOutput:
        """Finish all requests, because no step can be planned; `failed` have ended before."""
        logger.error("a step cannot be planned; all requests end with an error", exc_info=fault)
        updates = []
        for request_id in sorted(self.scheduler.request_ids):
            update = self.finish_request(request_id, FinishReason.ERROR)
            assert update is not None
            update.error = fault
            updates.append(update)
        return StepOutput((*failed, *updates), StepStats(0, 0, 0, 0.0), fault)

    def _compute(self, plan: StepPlan) -> tuple[StepPlan, list[SequenceUpdate], Exception | None]:
        """Run and commit a plan.

        Return it with the tokens that the draft model has drafted, its updates, and the exception
        that it raised, or None.
        """
        try:
            if self.speculator is not None:
                plan = self.speculator.draft(plan)
            if plan.copies:
                self.runner.backend.copy_blocks(plan.copies)
            output = self.runner.run(*batching.build(plan, self.config.block_size))
            updates = self.scheduler.commit(plan, batching.split(plan, output, self.model.vocab))
            if self.speculator is not None:
                self.speculator.observe(plan, updates)
            # The worker processes compute masks while this thread reports the step.
            self.input_processor.grammars.flush()
        except Exception as error:  # noqa: BLE001 - the engine continues with the other requests
            return plan, self.scheduler.fail(plan), error
        except BaseException:  # such as KeyboardInterrupt: the plan is never computed
            for update in self.scheduler.fail(plan):
                self._forget(update.request)
            raise
        return plan, updates, None

    def _complete(self, update: SequenceUpdate, now: float, fault: Exception | None) -> None:
        """Count an update of the step that ended at `now`, and add the state after it.

        `fault` is the exception that the step raised, or None.
        """
        request, times = update.request, update.request.times
        if update.token_ids:
            self._counts.generated += len(update.token_ids)
            if times.last_token_s is None:
                self._counts.add_prompt(request.num_prompt_tokens, request.num_reused_tokens)
                times.first_token_s = now
            else:
                update.inter_token_latency_s = now - times.last_token_s
            times.last_token_s = now
        update.add_state(now)
        if request.finish_reason is FinishReason.ERROR:
            update.error = _error_of(update, fault)
        elif request.finish_reason is not None and times.first_token_s is None:
            self._counts.add_prompt(request.num_prompt_tokens, request.num_reused_tokens)
        if request.finish_reason is not None:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        """Remove a sequence that has ended."""
        self._deadlines.pop(request.request_id, None)
        self._structured.pop(request.request_id, None)
        if self.speculator is not None:
            self.speculator.forget(request.request_id)

    def run(self, prompts: Sequence[PromptRequest]) -> Generator[StepOutput, None, None]:
        """Step until all prompts have ended; yield each step after processing its updates.

        Closing the generator aborts unfinished prompts. Raises EngineFaultError for a failed step.
        """
        router: UpdateRouter[None] = UpdateRouter(self.finish_request)
        router.add(prompts, None)
        try:
            for prompt in prompts:
                for request in prompt.requests:
                    self.add_request(request)
            while self.has_work:
                output = self.step()
                router.add_updates(output)
                if output.fault is not None:
                    raise _fault_error(output.fault)
                yield output
        finally:
            for prompt in prompts:
                router.remove(prompt)

    def warm_up(self) -> None:
        """Run one step, so that the first request does not wait for lazily loaded code."""
        params = SamplingParams(
            max_tokens=min(1, self.max_model_len - 1), ignore_eos=True, temperature=0.0
        )
        request = GenerationRequest(prompts=[[0]], params=params, request_id="warm-up")
        for _ in self.run(self.input_processor.process(request)):
            pass
        self._counts = TokenCounts()
        self.num_steps = 0
        kv_cache = self.scheduler.kv_cache
        kv_cache.prefix_cache_queries = kv_cache.prefix_cache_hits = 0

    def check_integrity(self) -> None:
        """Assert that all state is consistent; for tests and for an idle engine."""
        self.scheduler.check_integrity()
        assert self._deadlines.keys() | self._structured.keys() <= self.scheduler.request_ids

    def close(self) -> None:
        """End the processes that compile grammars. A second call has no effect."""
        self.input_processor.grammars.close()

    def _abort_overdue(self, now: float) -> None:
        for request_id, deadline_s in list(self._deadlines.items()):
            if deadline_s <= now:
                self.finish_request(request_id, FinishReason.ABORT)

    def _read_masks(self) -> tuple[SequenceUpdate, ...]:
        """Receive the masks of grammars, and finish the requests whose grammar has failed."""
        grace_s = min(max(_MASK_GRACE * self._last_step_s, _MIN_MASK_GRACE_S), _MAX_MASK_GRACE_S)
        self.input_processor.grammars.poll(grace_s)
        self._masks = self.mask_states()
        updates = []
        for request_id in sorted(self._masks.failed):
            update = self.finish_request(request_id, FinishReason.ERROR)
            assert update is not None
            assert update.request.grammar is not None
            update.error = update.request.grammar.error
            updates.append(update)
        return tuple(updates)


def _error_of(update: SequenceUpdate, fault: Exception | None) -> NanovllmError:
    """Return the error of a request that a step ended; a server hides its `__cause__`."""
    cause = fault or update.cause
    if cause is not None:
        return _fault_error(cause)
    if update.is_finite:
        return InvalidRequestError(_ALL_FORBIDDEN)
    return EngineFaultError(_NOT_A_NUMBER)


def _fault_error(cause: Exception) -> EngineFaultError:
    """Return the error of requests for an exception in a step; one that is meant for them stays."""
    if isinstance(cause, EngineFaultError):
        return cause
    error = EngineFaultError(_STEP_FAILED)
    error.__cause__ = cause
    return error
