"""AsyncEngine: an engine on a thread of its own, for any number of asyncio tasks.

Only the engine's thread touches the engine (engine_thread.py). Text is made on the event loop, from an output_processor that belongs to the request;
a handle that is slow finds its news merged. A request whose handle goes away is aborted. What is counted is what handles get: tokens
that the engine computes before it learns of a stop string are not.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import Enum

from nanovllm.engine.admission import (
    MAX_LOGPROBS_BYTES,
    MAX_QUEUED_REQUESTS,
    QUEUED_CACHES,
    Admission,
    HeldMemory,
    MemoryBudget,
    Reservation,
)
from nanovllm.engine.engine import Engine, StepOutput
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.metrics import (
    AdmissionStats,
    EngineSnapshot,
    FinishedPrompt,
    FinishedRequest,
    StepStats,
)
from nanovllm.engine.output_processor import SequenceUpdate
from nanovllm.engine.request_handle import Deadline, RequestHandle
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestTimeoutError,
)
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


MAX_STEP_END_S = 10.0
"""How long a step may take to end once the engine is to stop."""


class EngineState(Enum):
    """LOADING until a first step has run; then READY; STOPPED by the caller, FAILED when loading raised or the engine's thread broke down."""

    LOADING = "loading"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class AsyncEngine:
    """An engine for a server. Use it from one event loop: `await start()`, any number of `generate` and `stream`, `await stop()`."""

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        max_queued_tokens: int | None = None,
        max_logprobs_bytes: int = MAX_LOGPROBS_BYTES,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        """Prepare an engine that `load` will make on the engine's thread.

        Args:
            max_queued_requests: answers that may be unfinished at once; one more is refused with QueueFullError. Each counts that a request asks
                for, also of equal ones that are computed once, and those that best_of leaves out.
            max_queued_tokens: tokens that they may come to, prompts and max_tokens of all answers together; by default 16 times what the KV
                cache holds.
            max_logprobs_bytes: memory for the log-probabilities of answers that are not written yet.
            on_step: called on the event loop with what each step adds to the histograms.
        """
        self._thread = EngineThread(
            load, on_ready=self._set_ready, on_output=self._deliver, on_failure=self._fail
        )
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._logprobs = MemoryBudget(max_logprobs_bytes)
        self._timeouts = {"queued": 0, "running": 0}
        self._on_step = on_step
        self._engine: Engine | None = None
        self._state = EngineState.LOADING
        self._failure: BaseException | None = None
        self._generation_tokens = 0
        self._handles: dict[str, RequestHandle] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._when_stopped: list[Callable[[], None]] = []

    @property
    def state(self) -> EngineState:
        """Whether requests can be answered."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """What loading raised, or what ended the engine's thread later."""
        return self._failure

    @property
    def engine(self) -> Engine:
        """The engine, for its configuration, input_processor and tokenizer; raises EngineNotReadyError before it is loaded."""
        self._check_ready()
        assert self._engine is not None
        return self._engine

    def _check_ready(self) -> None:
        if self._state is not EngineState.READY:
            raise EngineNotReadyError(
                f"the engine is {self._state.value}; try again when it is ready"
            )

    def stats(self) -> EngineSnapshot:
        """The engine's numbers as of its last step or command; raises EngineNotReadyError before it is loaded."""
        self._check_ready()
        return replace(self._thread.snapshot, generation_tokens=self._generation_tokens)

    def admission_stats(self) -> AdmissionStats:
        """What unfinished requests have reserved, and how many were refused."""
        stats = self._admission.stats()
        return replace(stats, refused={**stats.refused, "memory": self._logprobs.num_refused})

    def hold_logprobs(self, prepared_requests: Sequence[PreparedRequest]) -> HeldMemory:
        """Memory for the log-probabilities of a checked request; whoever asks for it gives it back. Raises as `check_room`."""
        return self._logprobs.hold(sum(prepared.logprobs_bytes for prepared in prepared_requests))

    @property
    def timeouts(self) -> dict[str, int]:
        """Requests whose time was over, by where they stood then."""
        return dict(self._timeouts)

    async def start(self) -> None:
        """Start the engine's thread, which loads the model; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._thread.start(self._loop)

    async def wait_until_ready(self) -> None:
        """Wait until the model is loaded and one step has run; raises what loading raised."""
        while self._state is EngineState.LOADING:
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        if self._state is not EngineState.READY:
            raise EngineNotReadyError("the engine was stopped while it was loading")

    async def stop(self) -> None:
        """End all requests and the thread; harmless twice. A model that is still loading is left to its daemon thread, which nobody waits for."""
        is_loading = self._state is EngineState.LOADING
        self._state = EngineState.STOPPED if self._state is not EngineState.FAILED else self._state
        self._thread.stop()
        self._changed.set()
        for handle in set(self._handles.values()):
            handle.fail(EngineNotReadyError("the engine was stopped"))
        for call in self._when_stopped:
            call()
        if not is_loading:
            await self._join()

    def abandon(self) -> None:
        """End the thread after its step; for a finalizer, when nobody has requests any more."""
        self._thread.stop()

    async def _join(self) -> None:
        """Wait for the end of a step that is under way; a program must end also where that does not."""
        give_up_s = time.monotonic() + MAX_STEP_END_S
        while self._thread.is_alive:
            if time.monotonic() >= give_up_s:
                logger.warning("a step is still under way after %g s; it is left", MAX_STEP_END_S)
                return
            await asyncio.sleep(0.005)

    def when_stopped(self, call: Callable[[], None]) -> None:
        """Have `call` called on the event loop when the engine is stopped, as often as that is."""
        self._when_stopped.append(call)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """The whole answer. Cancelling the task aborts the request.

        Raises:
            InvalidRequestError: the request can never be answered.
            QueueFullError: too many requests are unfinished.
            RequestTimeoutError: it was not answered within `timeout_s`.
            EngineNotReadyError: still loading, or stopped.
            EngineFaultError: a step failed.
        """
        prepared = self.check(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        return await self.finish(self.submit(prepared, timeout_s))

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer as it grows: each output holds only what is new. Closing the iterator aborts the request. Raises as `generate`."""
        prepared = self.check(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        async with aclosing(self.follow(self.submit(prepared, timeout_s))) as pieces:
            async for news in pieces:
                yield news

    def check(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> PreparedRequest:
        """Check a request without queueing it, so that a caller with several finds out about all before any runs."""
        input_processor = self.engine.input_processor
        own_id = input_processor.new_request_id(request_id or "request")
        return input_processor.submit(
            own_id, prompt, params, priority=priority, cache_salt=cache_salt
        )

    def submit(self, prepared: PreparedRequest, timeout_s: float | None = None) -> RequestHandle:
        """Queue one checked request, due within `timeout_s` if given; its handle must be given to `finish` or `follow`."""
        return self.submit_all(
            [prepared], deadline=None if timeout_s is None else Deadline.after(timeout_s)
        )[0]

    def check_room(self, answers: int, tokens: int = 0) -> None:
        """Whether as many answers more may be queued now; raises InvalidRequestError where they never may, otherwise QueueFullError."""
        self._admission.check(answers, tokens)

    def reserve(self, answers: int, tokens: int) -> Reservation:
        """Room for what is submitted later, bit by bit; whoever asks for it gives it back. Raises as `check_room`."""
        (reservation,) = self._admission.reserve([(answers, tokens)])
        return reservation

    def submit_all(
        self,
        prepared_requests: Sequence[PreparedRequest],
        *,
        deadline: Deadline | None = None,
        within: Reservation | None = None,
    ) -> list[RequestHandle]:
        """Queue the checked parts of one request, all or none: room for every answer is taken before the first is queued.

        Args:
            deadline: when all of them are due; a part that is unfinished then raises RequestTimeoutError.
            within: room that was reserved for them before.

        Raises:
            InvalidRequestError: a sequence has the id of another one that is unfinished, or too many answers are asked for.
            QueueFullError: there is no room for them now.
            RequestTimeoutError: the deadline has passed.
            EngineNotReadyError: still loading, or stopped.
        """
        self._check_ready()
        self._check_ids(prepared_requests)
        if deadline is not None and time.monotonic() >= deadline.at_s:
            raise self._too_late(
                deadline,
                0,
                [(prepared.num_answers, prepared.num_tokens) for prepared in prepared_requests],
            )
        rooms: Sequence[Reservation | None] = [None] * len(prepared_requests)
        if within is None:
            rooms = self._admission.reserve(
                [(prepared.num_answers, prepared.num_tokens) for prepared in prepared_requests]
            )
        arrival_s = time.monotonic()
        handles = tuple(
            RequestHandle(prepared.output_processor, prepared.requests, room)
            for prepared, room in zip(prepared_requests, rooms, strict=True)
        )
        for handle in handles:
            handle.siblings = handles
        if deadline is not None:
            assert self._loop is not None
            timer = self._loop.call_later(
                deadline.at_s - arrival_s, self._expire, deadline, handles
            )
            for handle in handles:
                handle.deadline, handle.timer = deadline, timer
        for handle in handles:
            self._handles.update(
                dict.fromkeys((request.request_id for request in handle.requests), handle)
            )
            self._thread.add(
                handle.requests, arrival_s, None if deadline is None else deadline.at_s
            )
        return list(handles)

    def _check_ids(self, prepared_requests: Sequence[PreparedRequest]) -> None:
        """Raise InvalidRequestError where two sequences would have one id."""
        seen: set[str] = set()
        for prepared in prepared_requests:
            for request in prepared.requests:
                if request.request_id in self._handles or request.request_id in seen:
                    raise InvalidRequestError(
                        f"the request id {request.request_id!r} is in use by an unfinished request",
                        param="request_id",
                    )
                seen.add(request.request_id)

    def _expire(self, deadline: Deadline, handles: Sequence[RequestHandle]) -> None:
        """The time of a request is over: whatever is unfinished of it ends."""
        late = [handle for handle in handles if not handle.has_left and not handle.is_settled]
        if not late:
            return
        tokens = sum(handle.output_processor.num_output_tokens for handle in handles)
        rooms = [
            (handle.reservation.answers, handle.reservation.tokens)
            for handle in late
            if handle.reservation is not None
        ]
        reason = self._too_late(deadline, tokens, rooms)
        for handle in late:
            handle.fail(reason)
        self.leave(late)

    def _too_late(
        self, deadline: Deadline, tokens: int, rooms: Sequence[tuple[int, int]]
    ) -> RequestTimeoutError:
        """Count a request that is late, and say what it is told: `tokens` of it are there, and it needs `rooms`, each (answers, tokens)."""
        self._timeouts["running" if deadline.has_begun else "queued"] += 1
        answers, most_tokens = sum(room[0] for room in rooms), sum(room[1] for room in rooms)
        return deadline.error(
            tokens=tokens, retry_after_s=self._admission.retry_after_s(answers, most_tokens)
        )

    def too_late(self, deadline: Deadline) -> RequestTimeoutError:
        """Count a request whose time was over before it was queued, and say what it is told."""
        return self._too_late(deadline, 0, ())

    async def finish(self, handle: RequestHandle) -> RequestOutput:
        """Wait for the whole answer of a submitted request."""
        try:
            while not handle.output_processor.is_finished:
                await self._next(handle)
            self._raise_error(handle)
            return handle.output_processor.output(packed=True)
        finally:
            self.leave([handle])

    async def follow(self, handle: RequestHandle) -> AsyncGenerator[RequestOutput, None]:
        """Yield a submitted request's news until it is finished."""
        try:
            finished = False
            while not finished:
                await self._next(handle)
                finished = handle.output_processor.is_finished
                self._raise_error(handle)
                news = handle.output_processor.take_delta()
                if news is not None:
                    yield news
        finally:
            self.leave([handle])

    async def _next(self, handle: RequestHandle) -> None:
        await handle.news.wait()
        handle.news.clear()
        if handle.gone is not None:
            raise handle.gone

    def _raise_error(self, handle: RequestHandle) -> None:
        if handle.output_processor.error is not None:
            raise handle.output_processor.error

    def leave(self, handles: Sequence[RequestHandle]) -> None:
        """Nobody waits for these requests any more: whatever is unfinished of them is aborted. Harmless twice, and done by `finish` and `follow`."""
        for handle in handles:
            unfinished = tuple(handle.output_processor.unfinished_ids)
            if unfinished and not handle.has_left:
                self._thread.finish(unfinished, FinishReason.ABORT)
            for request_id in handle.output_processor.sequence_ids:
                self._handles.pop(request_id, None)
            handle.leave()

    def _deliver(self, output: StepOutput) -> None:
        """On the event loop: hand a step's updates to their handles, and count what they get."""
        for update in output.updates:
            handle = self._handles.get(update.request_id)
            if handle is None or handle.output_processor.ended(update.choice_index) is not None:
                continue  # nobody gets what was computed after it was left, or after a stop string
            if handle.deadline is not None:
                handle.deadline.has_begun = True
            try:
                self._hand_over(handle, update, output.stats)
            except Exception:  # the other updates of the step must reach their handles
                logger.exception("the answer to %s could not be put together", update.request_id)
                handle.fail(
                    EngineFaultError("the answer could not be put together; the log has the reason")
                )
            handle.news.set()
        if self._on_step is not None:
            self._on_step(output.stats)

    def _hand_over(self, handle: RequestHandle, update: SequenceUpdate, stats: StepStats) -> None:
        """Add an update to its answer, and to the step's statistics what it changed."""
        output_processor, index = handle.output_processor, update.choice_index
        if output_processor.add_update(update):
            self._thread.finish((update.request_id,), FinishReason.STOP)
        times = update.metrics
        if update.token_ids:
            self._generation_tokens += len(update.token_ids)
            if update.inter_token_latency_s is not None:
                stats.inter_token_latencies_s.append(update.inter_token_latency_s)
            elif times is not None:
                stats.times_to_first_token_s.append(update.time_s - times.arrival_s)
        ended = output_processor.ended(index)
        if ended is not None and times is not None:
            reason, num_tokens = ended
            request = handle.requests[index]
            stats.finished.append(
                FinishedRequest(
                    reason.value,
                    request.num_prompt_tokens,
                    num_tokens,
                    request.max_new_tokens,
                    update.num_reused_tokens,
                    update.num_preemptions,
                    replace(times, finished_s=update.time_s),
                )
            )
            if output_processor.is_finished:
                stats.finished_prompts.append(
                    FinishedPrompt(request.sampling.n, output_processor.max_output_tokens)
                )
        if output_processor.error is not None:
            for sibling in handle.siblings:
                sibling.fail(output_processor.error)

    def _set_ready(self, engine: Engine) -> None:
        """On the event loop: the model is loaded."""
        if self._state is EngineState.LOADING:
            self._engine, self._state = engine, EngineState.READY
            if self._admission.max_tokens is None:
                self._admission.max_tokens = QUEUED_CACHES * engine.cache_tokens
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """On the event loop: loading raised, or the thread came to an end that it must not come to."""
        if self._state is not EngineState.STOPPED:
            self._state, self._failure = EngineState.FAILED, error
        for handle in set(self._handles.values()):
            handle.fail(EngineFaultError("the engine has broken down; the log has the reason"))
        self._changed.set()
