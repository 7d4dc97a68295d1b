"""AsyncEngine: an engine on its own thread, for any number of asyncio tasks.

    request  -> prepare, on any thread: a PreparedRequest for each prompt
             -> generate, on the event loop: queue all prompts or none, return a RequestHandle
    step     -> on the event loop: add each update to its output, and notify its handle
    handle   -> wait(), or deltas(); release() aborts unfinished prompts

Only the engine's thread uses the engine (engine_thread.py). Text is decoded on the event loop. A
stop string is found there, so the engine may compute tokens after it; statistics do not count them.
"""

import asyncio
import logging
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
    HeldMemory,
    MemoryBudget,
    Reservation,
)
from nanovllm.engine.engine import Engine, StepOutput
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.generation_request import GenerationRequest, prepare_requests
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.inspection.inspector import Inspector
from nanovllm.engine.metrics import AdmissionStats, EngineSnapshot, StepStats
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.update_stats import count_update
from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestTimeoutError,
)

logger = logging.getLogger(__name__)


class EngineState(Enum):
    """State of the engine.

    LOADING until a first step has run, then READY. STOPPED by the caller. FAILED if an exception
    ended loading or the engine's thread.
    """

    LOADING = "loading"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class AsyncEngine:
    """An engine for a server, used from one event loop.

    >>> await async_engine.start()
    >>> await async_engine.wait_until_ready()
    >>> prepared = async_engine.prepare(GenerationRequest(prompts=["Once"], params=params))
    >>> with async_engine.generate(prepared) as handle:
    ...     await handle.wait()
    >>> output = prepared[0].output_processor.output()
    >>> await async_engine.stop()
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
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._logprobs = MemoryBudget(max_logprobs_bytes)
        self._timeouts = {"queued": 0, "running": 0}
        self._on_step = on_step
        self._engine: Engine | None = None
        self._state = EngineState.LOADING
        self._failure: BaseException | None = None
        self._generation_tokens = 0
        self._sequences: dict[str, tuple[RequestHandle, int]] = {}
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
            raise EngineNotReadyError(
                f"the engine is {self._state.value}; try again when it is ready"
            )

    def stats(self) -> EngineSnapshot:
        """Return the engine's statistics as of its last step or command.

        Raises EngineNotReadyError unless it is ready.
        """
        self._check_ready()
        return replace(self._thread.snapshot, generation_tokens=self._generation_tokens)

    def admission_stats(self) -> AdmissionStats:
        """Return the reservations of unfinished requests, and the numbers of refusals."""
        stats = self._admission.stats()
        return replace(stats, refused={**stats.refused, "memory": self._logprobs.num_refused})

    def hold_logprobs(self, prepared_requests: Sequence[PreparedRequest]) -> HeldMemory:
        """Reserve memory for the log-probabilities of a request; the caller releases it.

        Raises InvalidRequestError or QueueFullError as `MemoryBudget.hold`.
        """
        num_bytes = sum(prepared.logprobs_bytes for prepared in prepared_requests)
        return self._logprobs.hold(num_bytes, client=_client(prepared_requests))

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
        for handle in {handle for handle, _ in self._sequences.values()}:
            handle.fail(EngineNotReadyError("the engine was stopped"))
        self._thread.fail_calls(EngineNotReadyError("the engine was stopped"))
        for call in self._when_stopped:
            call()
        if not is_loading:
            await self._thread.join()

    def abandon(self) -> None:
        """End the thread after the current step, without waiting; for a finalizer."""
        self._thread.stop()

    def when_stopped(self, call: Callable[[], None]) -> None:
        """Call `call` on the event loop whenever the engine is stopped."""
        self._when_stopped.append(call)

    def prepare(self, request: GenerationRequest) -> tuple[PreparedRequest, ...]:
        """Check and tokenize a request without queueing it; may be called on any thread.

        Beam searches are prepared by `beam_search.begin_searches` instead. Raises
        InvalidRequestError, and EngineNotReadyError unless the engine is ready.
        """
        return prepare_requests(request, self.engine.input_processor)

    def check_room(self, choices: int, *, client: str = "") -> None:
        """Check whether there is room for more choices of a client.

        Raises QueueFullError if there is no room now, and InvalidRequestError if there never is.
        """
        self._admission.check(choices, client=client)

    def reserve(self, choices: int, tokens: int, *, client: str = "") -> Reservation:
        """Reserve room for a client's requests that are queued later; the caller releases it.

        Raises as `check_room`.
        """
        (reservation,) = self._admission.reserve([(choices, tokens)], client=client)
        return reservation

    def generate(
        self,
        prepared_requests: Sequence[PreparedRequest],
        *,
        deadline: Deadline | None = None,
        reservation: Reservation | None = None,
    ) -> RequestHandle:
        """Queue the prompts of one request, all or none. The caller releases the handle.

        Args:
            prepared_requests: the result of `prepare`.
            deadline: deadline of the request; unfinished prompts then raise RequestTimeoutError.
            reservation: room that `reserve` returned for this request before.

        Raises:
            InvalidRequestError: a sequence id is in use, or the request can never fit the queue.
            QueueFullError: there is no room for the request now.
            RequestTimeoutError: the deadline has passed.
            EngineNotReadyError: the engine is still loading, or stopped.
        """
        self._check_ready()
        self._check_ids(prepared_requests)
        sizes = [(prepared.num_choices, prepared.num_tokens) for prepared in prepared_requests]
        if deadline is not None and time.monotonic() >= deadline.at_s:
            raise self._timeout_error(deadline, 0, sizes)
        reservations: Sequence[Reservation | None] = [None] * len(sizes)
        if reservation is None:
            reservations = self._admission.reserve(sizes, client=_client(prepared_requests))
        arrival_s = time.monotonic()
        handle = RequestHandle(prepared_requests, reservations, self._on_release, deadline)
        if deadline is not None:
            assert self._loop is not None
            handle.timer = self._loop.call_later(
                deadline.at_s - arrival_s, self._expire, deadline, handle
            )
        for index, prepared in enumerate(prepared_requests):
            for request in prepared.requests:
                self._sequences[request.request_id] = handle, index
            self._thread.add(
                prepared.requests, arrival_s, None if deadline is None else deadline.at_s
            )
        return handle

    def _check_ids(self, prepared_requests: Sequence[PreparedRequest]) -> None:
        """Raise InvalidRequestError if two sequences would have the same id."""
        seen: set[str] = set()
        for prepared in prepared_requests:
            for request in prepared.requests:
                if request.request_id in self._sequences or request.request_id in seen:
                    raise InvalidRequestError(
                        f"the request id {request.request_id!r} is in use by an unfinished request",
                        param="request_id",
                    )
                seen.add(request.request_id)

    def _expire(self, deadline: Deadline, handle: RequestHandle) -> None:
        """Abort the unfinished prompts of a request that exceeds its deadline."""
        late = handle.unfinished
        if not late or handle.error is not None:
            return
        tokens = sum(
            prepared.output_processor.num_output_tokens for prepared in handle.prepared_requests
        )
        reservations = [handle.reservations[index] for index in late]
        sizes = [(room.choices, room.tokens) for room in reservations if room is not None]
        handle.fail(self._timeout_error(deadline, tokens, sizes))
        handle.release(late)

    def _timeout_error(
        self, deadline: Deadline, tokens: int, sizes: Sequence[tuple[int, int]]
    ) -> RequestTimeoutError:
        """Count a request that exceeds its deadline, and return its error.

        Args:
            tokens: number of tokens that the request has generated.
            sizes: the room that the request needs, each (choices, tokens).
        """
        self._timeouts["running" if deadline.has_begun else "queued"] += 1
        retry_after_s = self._admission.retry_after_s(
            sum(choices for choices, _ in sizes), sum(max_tokens for _, max_tokens in sizes)
        )
        return deadline.error(tokens=tokens, retry_after_s=retry_after_s)

    def timeout_error(self, deadline: Deadline) -> RequestTimeoutError:
        """Count a request that exceeds its deadline before it is queued, and return its error."""
        return self._timeout_error(deadline, 0, ())

    def _on_release(self, handle: RequestHandle, indices: Sequence[int]) -> None:
        """Abort the unfinished sequences of these prompts, and remove all of their sequences."""
        for index in indices:
            output_processor = handle.prepared_requests[index].output_processor
            unfinished = tuple(output_processor.unfinished_ids)
            if unfinished:
                self._thread.finish(unfinished, FinishReason.ABORT)
            for sequence_id in output_processor.sequence_ids:
                self._sequences.pop(sequence_id, None)

    def _deliver(self, output: StepOutput) -> None:
        """Pass a step's updates to their handles, and count them; runs on the event loop."""
        for update in output.updates:
            handle, index = self._sequences.get(update.request_id, (None, 0))
            if handle is None:
                continue  # computed after it was released
            prepared = handle.prepared_requests[index]
            if prepared.output_processor.ended(update.choice_index) is not None:
                continue  # computed after a stop string
            if handle.deadline is not None:
                handle.deadline.has_begun = True
            try:
                if prepared.output_processor.add_update(update):
                    self._thread.finish((update.request_id,), FinishReason.STOP)
                self._generation_tokens += len(update.token_ids)
                count_update(output.stats, prepared, update)
                error = prepared.output_processor.error
            except Exception:  # the other updates of the step must reach their handles
                logger.exception("the answer to %s could not be put together", update.request_id)
                error = EngineFaultError(
                    "the answer could not be put together; the log has the reason"
                )
            if error is not None:
                handle.fail(error)
            handle.notify(index)
        if self._on_step is not None:
            self._on_step(output.stats)

    def _set_ready(self, engine: Engine) -> None:
        """Set the state READY when the model is loaded; runs on the event loop."""
        if self._state is EngineState.LOADING:
            self._engine, self._state = engine, EngineState.READY
            if self._admission.max_tokens is None:
                self._admission.max_tokens = QUEUED_CACHES * engine.cache_tokens
            if engine.memory.free_bytes is not None:
                self._logprobs.fit(engine.memory.free_bytes // 2)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """Set the state FAILED and fail all requests; runs on the event loop."""
        if self._state is not EngineState.STOPPED:
            self._state, self._failure = EngineState.FAILED, error
        for handle in {handle for handle, _ in self._sequences.values()}:
            handle.fail(EngineFaultError("the engine has broken down; the log has the reason"))
        self._thread.fail_calls(EngineNotReadyError("the engine has broken down"))
        self._changed.set()


def _client(prepared_requests: Sequence[PreparedRequest]) -> str:
    """Return the client of a request's prompts."""
    return prepared_requests[0].requests[0].client if prepared_requests else ""
