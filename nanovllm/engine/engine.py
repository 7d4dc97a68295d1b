"""The engine: a scheduler over a KV cache, a runner, and step().

    plan    = scheduler.schedule()          who runs, how many tokens each, in which blocks, and which to copy first
    arrays  = batching.build(plan)          flat arrays, no padding
    output  = runner.run(*arrays)           forward pass, then sampling
    updates = scheduler.commit(plan, ...)   append, finish, free

One thread uses an engine. `input_processor` and `tokenizer` may be used from others.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig, format_bytes
from nanovllm.engine.input_processor import (
    InputProcessor,
    Limits,
    PreparedRequest,
    check_sampling_defaults,
)
from nanovllm.engine.metrics import EngineSnapshot, RequestTimes, StepStats
from nanovllm.engine.output_processor import SequenceUpdate
from nanovllm.engine.scheduling import batching
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import RequestUpdate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError
from nanovllm.model.backend import LoadOptions
from nanovllm.model.checkpoint import stored_dtype
from nanovllm.model.config import GPT2Config, load_generation_config
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.runner.native_model_runner import NativeModelRunner
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

_ALL_FORBIDDEN = "every token is forbidden by the request's settings together, so none can come next; loosen one of them"
_FAULT = "a step of the engine failed; the log has the reason"
_NOT_A_NUMBER = "the network's output is not a number; is the checkpoint sound?"
_BLOCKED_WAIT_S = 0.002
"""For masks where nothing else can run; commands for the engine wait as long."""
_MASK_GRACE = 0.25
"""Of the last step's time: what a step waits for masks that are about to come."""
_MIN_MASK_GRACE_S, _MAX_MASK_GRACE_S = 0.0003, 0.002


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step did; `fault` is the exception where it raised, and then its requests ended with an error."""

    updates: tuple[SequenceUpdate, ...]
    stats: StepStats
    fault: Exception | None = None


class Engine:
    """Runs requests of one model."""

    def __init__(
        self,
        config: EngineConfig,
        runner: NativeModelRunner,
        tokenizer: Tokenizer,
        generation_config: dict[str, object] | None = None,
    ) -> None:
        """Allocate the cache and start empty; raises ValueError where the settings do not fit the model."""
        model = runner.config
        max_model_len = _max_model_len(config, model)
        num_blocks = config.num_blocks or config.kv_cache_bytes // runner.backend.block_bytes(
            config.block_size
        )
        if num_blocks == 0:
            raise ValueError(
                f"kv_cache_memory is {config.kv_cache_bytes} bytes, less than one block of {config.block_size} tokens "
                f"({runner.backend.block_bytes(config.block_size)} bytes); raise it or lower block_size"
            )
        try:
            runner.backend.allocate_cache(num_blocks, config.block_size)
        except MemoryError:
            asked = num_blocks * runner.backend.block_bytes(config.block_size)
            raise ValueError(
                f"the KV cache of {format_bytes(asked)} cannot be had from the operating system; "
                "lower kv_cache_memory"
            ) from None
        self.config = config
        self.model = model
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self.generation_config = generation_config or {}
        self.runner = runner
        self.blocks = BlockManager(
            num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        limits = Limits(
            max_model_len,
            self.cache_tokens,
            config.max_logprobs,
            has_priorities=config.scheduling_policy == "priority",
        )
        self.input_processor = InputProcessor(model, tokenizer, limits, seed=config.seed)
        self._times: dict[str, RequestTimes] = {}
        self._deadlines: dict[str, float] = {}  # of those that have one
        self._prompt_tokens = 0
        self._prompt_tokens_cached = 0
        self._prompt_tokens_computed = 0
        self._generation_tokens = 0
        self._last_step_s = 0.0

    @classmethod
    def load(cls, folder: Path, config: EngineConfig | None = None) -> "Engine":
        """The engine of a model folder; raises CheckpointError where the folder, ValueError where the settings cannot be used."""
        config = config or EngineConfig()
        cls.check(folder, config)
        tokenizer = Tokenizer.load(folder)
        generation_config = load_generation_config(folder)
        if config.dtype == "auto":
            is_numpy = config.backend == "numpy"  # computes in float32 only
            config = replace(config, dtype="float32" if is_numpy else stored_dtype(folder))
        options = LoadOptions(
            dtype=config.dtype,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            batch_invariant=config.batch_invariant,
            num_threads=config.num_threads,
        )
        runner = NativeModelRunner.load(folder, config.backend, options)
        return cls(config, runner, tokenizer, generation_config)

    @staticmethod
    def check(folder: Path, config: EngineConfig) -> None:
        """Raise, without reading the weights, what `load` would about the folder's settings (CheckpointError) and the engine's (ValueError)."""
        _max_model_len(config, GPT2Config.load(folder))
        check_sampling_defaults(folder / "generation_config.json", load_generation_config(folder))

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.blocks.num_blocks * self.blocks.block_size

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def stats(self) -> EngineSnapshot:
        """The engine at this moment; for the engine's thread."""
        scheduler = self.scheduler
        return EngineSnapshot(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=scheduler.num_waiting,
            num_requests_deferred=scheduler.num_deferred,
            kv_cache_usage=self.blocks.usage,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_cached=self._prompt_tokens_cached,
            prompt_tokens_computed=self._prompt_tokens_computed,
            generation_tokens=self._generation_tokens,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
        )

    def add_request(
        self, request: Request, arrival_s: float | None = None, deadline_s: float | None = None
    ) -> None:
        """Queue a sequence that the input processor has made; `arrival_s` is when its request came, now unless given.

        After `deadline_s` no step works on it any more: it is aborted, of which whoever gave the deadline knows without being told.
        Raises InvalidRequestError where its id is in use.
        """
        self.scheduler.add(request)
        if deadline_s is not None:
            self._deadlines[request.request_id] = deadline_s
        self._times[request.request_id] = RequestTimes(
            time.monotonic() if arrival_s is None else arrival_s
        )

    def finish_request(self, request_id: str, reason: FinishReason) -> SequenceUpdate | None:
        """End a sequence in whatever state it is; None where it has ended already, or never was.

        The reason is STOP where a stop string has completed its answer, which only the caller knows,
        and ABORT where nobody waits for it any more.
        """
        update = self.scheduler.finish(request_id, reason)
        if update is None:
            return None
        now = time.monotonic()
        return SequenceUpdate(
            request_id,
            update.request.choice_index,
            None,
            None,
            (),
            reason,
            metrics=self._forget(request_id).summary(now),
            time_s=now,
        )

    def abort_request(self, request_id: str) -> SequenceUpdate | None:
        """End a sequence that nobody waits for any more; None where it has ended already, or never was."""
        return self.finish_request(request_id, FinishReason.ABORT)

    def step(self, on_planned: Callable[[], None] | None = None) -> StepOutput:
        """Run one step; without work it does nothing. `on_planned` is called before it computes."""
        started = time.monotonic()
        self._abort_overdue(started)
        failed = self._end_failed_grammars()
        plan = self.scheduler.schedule()
        if not plan.sequences:
            if self.scheduler.has_blocked and not failed:
                self.input_processor.grammars.wait(_BLOCKED_WAIT_S)
            return StepOutput(failed, StepStats(0, 0, 0, 0.0))
        if on_planned is not None:
            on_planned()
        num_decode_tokens = sum(sequence.request.is_decoding for sequence in plan.sequences)
        for sequence in plan.sequences:
            times = self._times[sequence.request.request_id]
            if times.first_scheduled_s is None:
                times.first_scheduled_s = started
        fault: Exception | None = None
        updates: list[RequestUpdate[TokenLogprobs]] | list[RequestUpdate[Any]]
        try:
            if plan.copies:
                self.runner.backend.copy_blocks(plan.copies)
            output = self.runner.run(*batching.build(plan, self.config.block_size))
            updates = self.scheduler.commit(plan, batching.split(plan, output, self.model.vocab))
            self.input_processor.grammars.flush()  # masks are computed while this thread reports the step
        except Exception as error:  # noqa: BLE001 - whatever went wrong in it, the engine goes on with the other requests
            fault = error
            updates = self.scheduler.fail(plan)
        except BaseException:  # Ctrl-C: nobody will compute what the plan promised
            for ended in self.scheduler.fail(plan):
                self._forget(ended.request.request_id)
            raise
        for cause in filter(None, (fault, *(update.fault for update in updates))):
            logger.error("a step failed; its requests end with an error", exc_info=cause)
        now = time.monotonic()
        stats = StepStats(
            plan.num_tokens, plan.num_tokens - num_decode_tokens, num_decode_tokens, now - started
        )
        self._last_step_s = stats.duration_s
        self._prompt_tokens_computed += stats.num_prompt_tokens
        return StepOutput(
            (*failed, *(self._to_update(update, now, fault) for update in updates)), stats, fault
        )

    def run(
        self, prepared_requests: Sequence[PreparedRequest]
    ) -> Generator[StepOutput, None, None]:
        """Work until every answer is complete; yields each step once its updates are in their output_processors.

        Whatever is unfinished when the generator is closed, or when it raises, ends there. Raises EngineFaultError when a step fails.
        """
        output_processors = {
            request.request_id: prepared.output_processor
            for prepared in prepared_requests
            for request in prepared.requests
        }
        try:
            for prepared in prepared_requests:
                for request in prepared.requests:
                    self.add_request(request)
            while self.has_work:
                output = self.step()
                for update in output.updates:
                    if output_processors[update.request_id].add_update(update):
                        self.finish_request(update.request_id, FinishReason.STOP)
                if output.fault is not None:
                    raise EngineFaultError(
                        f"a step of the engine failed: {output.fault}"
                    ) from output.fault
                yield output
        finally:
            for request_id in output_processors:
                self.abort_request(request_id)

    def warm_up(self) -> None:
        """Run one step, so that the first request does not wait for lazily loaded code; raises what the step raised."""
        params = SamplingParams(
            max_tokens=min(1, self.max_model_len - 1), ignore_eos=True, temperature=0.0
        )
        for _ in self.run([self.input_processor.submit("warm-up", [0], params)]):
            pass
        self._prompt_tokens = self._prompt_tokens_cached = self._prompt_tokens_computed = 0
        self._generation_tokens = 0
        self.scheduler.prefix_cache_queries = self.scheduler.prefix_cache_hits = 0

    def check_integrity(self) -> None:
        """Assert that the books balance; for tests and for an idle engine."""
        self.scheduler.check_integrity()
        assert self._times.keys() == self.scheduler.request_ids
        assert self._deadlines.keys() <= self._times.keys()

    def _forget(self, request_id: str) -> RequestTimes:
        """Keep nothing about a sequence that has ended; gives its times."""
        self._deadlines.pop(request_id, None)
        return self._times.pop(request_id)

    def _abort_overdue(self, now: float) -> None:
        for request_id in [
            request_id for request_id, deadline_s in self._deadlines.items() if deadline_s <= now
        ]:
            self.abort_request(request_id)

    def _end_failed_grammars(self) -> tuple[SequenceUpdate, ...]:
        """Take in the masks of grammars, and end the requests whose grammar can be followed no further."""
        grace_s = min(max(_MASK_GRACE * self._last_step_s, _MIN_MASK_GRACE_S), _MAX_MASK_GRACE_S)
        self.input_processor.grammars.poll(grace_s)
        updates = []
        for request, error in self.scheduler.failed_grammars():
            update = self.finish_request(request.request_id, FinishReason.ERROR)
            if update is not None:
                updates.append(replace(update, error=error))
        return tuple(updates)

    def close(self) -> None:
        """End the processes that compile grammars. Harmless twice."""
        self.input_processor.grammars.close()

    def _to_update(
        self, update: RequestUpdate[Any], now: float, fault: Exception | None
    ) -> SequenceUpdate:
        """Take the times of one update, and strip it of everything that belongs to this thread."""
        request = update.request
        times = self._times[request.request_id]
        inter_token_latency_s = None
        if update.token_id is not None:
            self._generation_tokens += 1
            if times.last_token_s is None:
                self._count_prompt(request)
                times.first_token_s = now
            else:
                inter_token_latency_s = now - times.last_token_s
            times.last_token_s = now
        has_ended = update.finish_reason is not None
        if has_ended:
            if times.first_token_s is None and update.finish_reason is not FinishReason.ERROR:
                self._count_prompt(request)
            self._forget(request.request_id)
        return SequenceUpdate(
            request.request_id,
            request.choice_index,
            update.token_id,
            update.logprobs,
            tuple(update.prompt_logprobs),
            update.finish_reason,
            request.stop_reason,
            request.num_cached_tokens or 0,
            times.summary(now if has_ended else None),
            _error_of(update, fault),
            update.hidden,  # type: ignore[arg-type]
            now,
            inter_token_latency_s,
            request.num_preemptions,
            request.num_reused_tokens,
        )

    def _count_prompt(self, request: Request) -> None:
        """Count a prompt that has been read to its end for the first time."""
        self._prompt_tokens += request.num_prompt_tokens
        self._prompt_tokens_cached += request.num_reused_tokens


def _error_of(update: RequestUpdate[Any], fault: Exception | None) -> NanovllmError | None:
    """What to raise for a request that a step ended with an error; its cause is not for clients to read."""
    if update.finish_reason is not FinishReason.ERROR:
        return None
    cause = fault or update.fault
    if cause is not None:
        error = EngineFaultError(_FAULT)
        error.__cause__ = cause
        return error
    return (
        InvalidRequestError(_ALL_FORBIDDEN) if update.is_finite else EngineFaultError(_NOT_A_NUMBER)
    )


def _max_model_len(config: EngineConfig, model: GPT2Config) -> int:
    """The context that requests have; ValueError where the model has less."""
    if config.max_model_len is None:
        return model.max_positions
    if config.max_model_len > model.max_positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model has only {model.max_positions} positions; lower it or leave it out"
        )
    return config.max_model_len
