"""AsyncEngine: an engine on its own thread, for any number of asyncio tasks.

    request  -> prepare, on any thread: a PromptRequest for each prompt
             -> generate, on the event loop: queue all prompts or none, return a RequestHandle
    step     -> on the event loop: add each update to its prompt, and notify its handle
    handle   -> wait(), or deltas(); release() aborts unfinished prompts

Only the engine's thread uses the engine (engine_thread.py). Text is decoded on the event loop. A
stop string is found there, so the engine may compute tokens after it; statistics do not count them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum

from nanovllm.deadlines import Deadline
from nanovllm.engine.admission import (
    MAX_LOGPROBS_BYTES,
    MAX_QUEUED_REQUESTS,
    QUEUED_CACHES,
    Admission,
    RequestSize,
    Reservation,
    total_size,
)
from nanovllm.engine.engine import Engine
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.inspection.inspector import Inspector
from nanovllm.engine.metrics import DraftCounts, EngineSnapshot, StepStats
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.engine.step_output import StepOutput
from nanovllm.engine.update_router import UpdateRouter
from nanovllm.errors import EngineFaultError, EngineNotReadyError, RequestTimeoutError

_NOTHING = RequestSize()
_SEE_LOG = "the log has the reason"


class EngineState(Enum):
    """State of the engine.

    LOADING until a first step has run, then READY. STOPPED by the caller. FAILED if an exception
    ended loading or the engine's thread, or a step does not end.
    """

    LOADING = "loading"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class AsyncEngine:
    """An engine for a server, used from one event loop.

    >>> await async_engine.start()
    >>> await async_engine.wait_until_ready()
    >>> prompts = async_engine.prepare(GenerationRequest(prompts=["Once"], params=params))
    >>> with async_engine.generate(prompts) as handle:
    ...     await handle.wait()
    >>> output = prompts[0].output()
    >>> await async_engine.stop()

    Attributes:
        admission: what unfinished requests hold; `generate` reserves room for each.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        max_queued_tokens: int | None = None,
        max_logprobs_bytes: int = MAX_LOGPROBS_BYTES,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        """Create the engine's thread; `start` starts it.

        Args:
            load: returns the engine; called on the engine's thread.
            max_queued_requests: maximum number of unfinished choices of a client; one more raises
                QueueFullError. Greedy choices that are computed once, and choices that best_of
                discards, count too. All clients together may have a quarter more (shares.py).
            max_queued_tokens: maximum total tokens (prompt + max_tokens of every choice) over all
                unfinished requests of a client; by default 16 times the capacity of the KV cache.
            max_logprobs_bytes: maximum memory for log-probabilities of a client's unwritten
                responses; less where the memory of the process is limited
                (`MemoryPlan.free_bytes`).
            on_step: called on the event loop with the statistics of each step.
        """
        self._thread = EngineThread(
            load, on_ready=self._set_ready, on_output=self._deliver, on_failure=self._fail
        )
        self._inspector = Inspector(self._thread)
        self.admission = Admission(max_queued_requests, max_queued_tokens, max_logprobs_bytes)
        self._timeouts = {"queued": 0, "running": 0}
        self._on_step = on_step
        self._engine: Engine | None = None
        self._state = EngineState.LOADING
        self._failure: BaseException | None = None
        self._generation_tokens, self._drafts = 0, DraftCounts.begin(None)
        self._router: UpdateRouter[RequestHandle] = UpdateRouter(self._thread.finish)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._when_stopped: list[Callable[[], None]] = []

    @property
    def state(self) -> EngineState:
        """The state; only a READY engine accepts requests."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """The exception of loading, or the one that ended the engine's thread; otherwise None."""
        return self._failure

    @property
    def problem(self) -> str:
        """Why the engine is not ready, for clients."""
        if self._state is not EngineState.FAILED:
            return f"the engine is {self._state.value}"
        reason = self._failure if isinstance(self._failure, EngineFaultError) else _SEE_LOG
        return f"the engine has failed: {reason}; restart the server"

    @property
    def engine(self) -> Engine:
        """The engine, for what never changes: configuration, sizes, input processor and tokenizer.

        Raises EngineNotReadyError unless it is ready.
        """
        self._check_ready()
        assert self._engine is not None
        return self._engine

    @property
    def inspector(self) -> Inspector:
        """Watches, pauses and steps the engine; raises EngineNotReadyError unless it is ready."""
        self._check_ready()
        return self._inspector

    @property
    def has_thread(self) -> bool:
        """Whether the engine's thread runs: `stop` does not wait for one that loads the model."""
        return self._thread.is_alive

    def _check_ready(self) -> None:
        if self._state is not EngineState.READY:
            is_final = self._state is EngineState.FAILED
            raise EngineNotReadyError(
                self.problem if is_final else f"{self.problem}; try again when it is ready"
            )

    def stats(self) -> EngineSnapshot:
        """Return the engine's statistics as of its last step or command.

        Raises EngineNotReadyError unless it is ready.
        """
        self._check_ready()
        return replace(
            self._thread.snapshot,
            generation_tokens=self._generation_tokens,
            **self._drafts.fields(),
        )

    @property
    def timeouts(self) -> dict[str, int]:
        """Numbers of requests that exceeded their deadline, by "queued" and "running"."""
        return dict(self._timeouts)

    async def start(self) -> None:
        """Start the engine's thread, which loads the model; return without waiting for it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start(self._loop)

    async def wait_until_ready(self) -> None:
        """Wait until the model is loaded and one step has run; raises the exception of loading."""
        while self._state is EngineState.LOADING:
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        if self._state is not EngineState.READY:
            raise EngineNotReadyError("the engine was stopped while it was loading")

    async def stop(self) -> None:
        """End all requests and the thread. A second call has no effect.

        While the model is loading, `stop` does not wait for the thread, which is a daemon.
        """
        is_loading = self._engine is None and self._failure is None
        self._state = EngineState.STOPPED if self._state is not EngineState.FAILED else self._state
        self._thread.stop()
        self._changed.set()
        error = EngineNotReadyError("the engine was stopped")
        for handle in self._router.owners:
            handle.fail(error)
        self._thread.fail_calls(error)
        for call in self._when_stopped:
            call()
        if not is_loading:
            await self._thread.join()

    def fail(self, error: EngineFaultError, thread: int) -> bool:
        """End all requests with `error` if the engine is stuck; any thread may call this.

        Returns False, and does nothing, unless `thread` is the id of the engine's thread.
        """
        return self._thread.fail(error, thread)

    def abandon(self) -> None:
        """End the thread after the current step, without waiting; for a finalizer."""
        self._thread.stop()

    def when_stopped(self, call: Callable[[], None]) -> None:
        """Call `call` on the event loop whenever the engine is stopped."""
        self._when_stopped.append(call)

    def prepare(self, request: GenerationRequest) -> tuple[PromptRequest, ...]:
        """Check and tokenize a request without queueing it; may be called on any thread.

        `beam_search.BeamSearches` prepares beam searches instead. Raises
        InvalidRequestError, and EngineNotReadyError unless the engine is ready.
        """
        return self.engine.input_processor.process(request)

    def generate(
        self,
        prompts: Sequence[PromptRequest],
        *,
        deadline: Deadline | None = None,
        reservation: Reservation | None = None,
    ) -> RequestHandle:
        """Queue the prompts of one request, all or none. The caller releases the handle.

        Args:
            prompts: the result of `prepare`.
            deadline: deadline of the request; unfinished prompts then raise RequestTimeoutError.
            reservation: room that `admission` has reserved for this request before.

        Raises:
            InvalidRequestError: a sequence id is in use, or the request can never fit the queue.
            QueueFullError: there is no room for the request now.
            RequestTimeoutError: the deadline has passed.
            EngineNotReadyError: the engine is still loading, or stopped.
        """
        self._check_ready()
        self._router.check_ids(prompts)
        sizes = [prompt.size for prompt in prompts]
        if deadline is not None and time.monotonic() >= deadline.at_s:
            raise self.timeout_error(deadline, size=total_size(sizes))
        client = prompts[0].client if prompts else ""
        own = self.admission.reserve(sizes, client=client) if reservation is None else None
        handle = RequestHandle(prompts, own, self._router.remove, deadline)
        self._router.add(prompts, handle)
        arrival_s = time.monotonic()
        if deadline is not None:
            assert self._loop is not None
            handle.timer = self._loop.call_later(
                deadline.at_s - arrival_s, self._expire, deadline, handle
            )
        for prompt in prompts:
            deadline_s = None if deadline is None else deadline.at_s
            self._thread.add(prompt.requests, arrival_s, deadline_s)
        return handle

    def _expire(self, deadline: Deadline, handle: RequestHandle) -> None:
        """Abort the unfinished prompts of a request that exceeds its deadline."""
        if not handle.unfinished or handle.error is not None:
            return
        room = handle.reservation
        size = RequestSize() if room is None else room.unfinished
        handle.fail(self.timeout_error(deadline, handle.num_output_tokens, size))
        for index in handle.unfinished:
            handle.end(index)

    def timeout_error(
        self, deadline: Deadline, tokens: int = 0, size: RequestSize = _NOTHING
    ) -> RequestTimeoutError:
        """Count a request that exceeds its deadline, and return its error.

        Args:
            tokens: number of tokens that the request has generated.
            size: the room that the request needs; nothing if it was not queued yet.
        """
        self._timeouts["running" if deadline.has_begun else "queued"] += 1
        retry_after_s = self.admission.retry_after_s(size.choices, size.tokens)
        return deadline.error(tokens=tokens, retry_after_s=retry_after_s)

    def _deliver(self, output: StepOutput) -> None:
        """Pass a step's updates to their handles, and count them; runs on the event loop."""
        for prompt, handle in self._router.add_updates(output):
            if handle.deadline is not None:
                handle.deadline.has_begun = True
            handle.notify(prompt)
        self._generation_tokens += output.stats.num_generated_tokens
        for num_drafted, num_accepted in output.stats.drafts:
            self._drafts.add(num_drafted, num_accepted)
        if self._on_step is not None:
            self._on_step(output.stats)

    def _set_ready(self, engine: Engine) -> None:
        """Set the state READY when the model is loaded; runs on the event loop."""
        if self._state is EngineState.LOADING:
            self._engine, self._state = engine, EngineState.READY
            self._drafts = DraftCounts.begin(engine.config.speculation)
            if self.admission.tokens.limit is None:
                self.admission.tokens.limit = QUEUED_CACHES * engine.cache_tokens
            if engine.memory.free_bytes is not None:
                self.admission.logprobs_bytes.fit(engine.memory.free_bytes // 2)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """Set the state FAILED and fail all requests; runs on the event loop."""
        if self._state is not EngineState.STOPPED:
            self._state, self._failure = EngineState.FAILED, error
        if not isinstance(error, EngineFaultError):
            error = EngineFaultError(f"the engine has broken down; {_SEE_LOG}")
        for handle in self._router.owners:
            handle.fail(error)
        self._thread.fail_calls(EngineNotReadyError(self.problem))
        self._changed.set()
