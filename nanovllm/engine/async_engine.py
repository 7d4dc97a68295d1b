"""AsyncEngine: an engine on a thread of its own, for any number of asyncio tasks.

Only the engine's thread touches the engine. Commands (add, abort, stop) enter by one queue that is drained between steps; what a step
gave leaves by one `call_soon_threadsafe`. Text is made on the event loop, from an assembler that belongs to the request; a reader that
is slow finds its news merged. A request whose reader goes away is aborted.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

from nanovllm.engine.admission import MAX_QUEUED_REQUESTS, QUEUED_CACHES, Admission, Reservation
from nanovllm.engine.engine import Engine, StepOutput
from nanovllm.engine.intake import Prompt, Submission
from nanovllm.engine.metrics import (
    AdmissionStats,
    EngineStats,
    FinishedRequest,
    RequestTimes,
    StepStats,
)
from nanovllm.engine.reader import Deadline, Reader
from nanovllm.engine.request import FinishReason, Request
from nanovllm.errors import EngineFaultError, EngineNotReadyError, RequestTimeoutError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class EngineState(Enum):
    """LOADING until a first step has run; then READY; STOPPED by the caller, FAILED when loading raised or the engine's thread broke down."""

    LOADING = "loading"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class _Add:
    requests: tuple[Request, ...]
    arrival_s: float
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _StopFound:
    """A stop string has ended the answer of this sequence, which the engine knows nothing about."""

    request: Request


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class AsyncEngine:
    """An engine for a server. Use it from one event loop: `await start()`, any number of `generate` and `stream`, `await stop()`."""

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_queued_requests: int = MAX_QUEUED_REQUESTS,
        max_queued_tokens: int | None = None,
        on_step: Callable[[StepStats], None] | None = None,
    ) -> None:
        """Prepare an engine that `load` will make on the engine's thread.

        Args:
            max_queued_requests: answers that may be unfinished at once; one more is refused with QueueFullError. Each counts that a request asks
                for, also of equal ones that are computed once, and those that best_of leaves out.
            max_queued_tokens: tokens that they may come to, prompts and max_tokens of all answers together; by default 16 times what the KV
                cache holds.
            on_step: called on the event loop with what each step adds to the histograms.
        """
        self._load = load
        self._admission = Admission(max_queued_requests, max_queued_tokens)
        self._timeouts = {"queued": 0, "running": 0}
        self._on_step = on_step
        self._engine: Engine | None = None
        self._state = EngineState.LOADING
        self._failure: BaseException | None = None
        self._commands: queue.SimpleQueue[_Add | _Abort | _StopFound | _Stop] = queue.SimpleQueue()
        self._readers: dict[str, Reader] = {}
        self._ids = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._changed = asyncio.Event()

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
        """The engine, for its configuration, intake and tokenizer; raises EngineNotReadyError before it is loaded."""
        self._check_ready()
        assert self._engine is not None
        return self._engine

    def _check_ready(self) -> None:
        if self._state is not EngineState.READY:
            raise EngineNotReadyError(
                f"the engine is {self._state.value}; try again when it is ready"
            )

    def stats(self) -> EngineStats:
        """The engine at this moment, as of its last step."""
        return self.engine.stats()

    def admission_stats(self) -> AdmissionStats:
        """What unfinished requests have reserved, and how many were refused."""
        return self._admission.stats()

    @property
    def timeouts(self) -> dict[str, int]:
        """Requests whose time was over, by where they stood then."""
        return dict(self._timeouts)

    async def start(self) -> None:
        """Start the engine's thread, which loads the model; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        self._thread.start()

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
        self._commands.put(_Stop())
        self._changed.set()
        for reader in set(self._readers.values()):
            reader.give_up(EngineNotReadyError("the engine was stopped"))
        if self._thread is not None and not is_loading:
            await asyncio.to_thread(self._thread.join)

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
        submission = self.check(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        return await self.finish(self.submit(submission, timeout_s))

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
        submission = self.check(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        async with aclosing(self.follow(self.submit(submission, timeout_s))) as pieces:
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
    ) -> Submission:
        """Check a request without queueing it, so that a caller with several finds out about all before any runs."""
        own_id = f"{next(self._ids)}-{request_id or 'request'}"
        return self.engine.intake.submit(
            own_id, prompt, params, priority=priority, cache_salt=cache_salt
        )

    def submit(self, submission: Submission, timeout_s: float | None = None) -> Reader:
        """Queue one checked request, due within `timeout_s` if given; its reader must be given to `finish` or `follow`."""
        return self.submit_all(
            [submission], deadline=None if timeout_s is None else Deadline.after(timeout_s)
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
        submissions: Sequence[Submission],
        *,
        deadline: Deadline | None = None,
        within: Reservation | None = None,
    ) -> list[Reader]:
        """Queue the checked parts of one request, all or none: room for every answer is taken before the first is queued.

        Args:
            deadline: when all of them are due; a part that is unfinished then raises RequestTimeoutError.
            within: room that was reserved for them before.
        """
        self._check_ready()
        if deadline is not None and time.monotonic() >= deadline.at_s:
            raise self._too_late(
                deadline,
                0,
                [(submission.num_answers, submission.num_tokens) for submission in submissions],
            )
        rooms: Sequence[Reservation | None] = [None] * len(submissions)
        if within is None:
            rooms = self._admission.reserve(
                [(submission.num_answers, submission.num_tokens) for submission in submissions]
            )
        arrival_s = time.monotonic()
        readers = tuple(
            Reader(submission.assembler, submission.requests, room)
            for submission, room in zip(submissions, rooms, strict=True)
        )
        if deadline is not None:
            assert self._loop is not None
            timer = self._loop.call_later(
                deadline.at_s - arrival_s, self._expire, deadline, readers
            )
            for reader in readers:
                reader.siblings, reader.deadline, reader.timer = readers, deadline, timer
        for reader in readers:
            self._readers.update(
                dict.fromkeys((request.request_id for request in reader.requests), reader)
            )
            self._commands.put(
                _Add(reader.requests, arrival_s, None if deadline is None else deadline.at_s)
            )
        return list(readers)

    def _expire(self, deadline: Deadline, readers: Sequence[Reader]) -> None:
        """The time of a request is over: whatever is unfinished of it ends."""
        late = [
            reader
            for reader in readers
            if not reader.has_left and reader.gone is None and not reader.assembler.is_finished
        ]
        if not late:
            return
        tokens = sum(reader.assembler.num_output_tokens for reader in readers)
        rooms = [
            (reader.reservation.answers, reader.reservation.tokens)
            for reader in late
            if reader.reservation is not None
        ]
        reason = self._too_late(deadline, tokens, rooms)
        for reader in late:
            reader.give_up(reason)
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

    async def finish(self, reader: Reader) -> RequestOutput:
        """Wait for the whole answer of a submitted request."""
        try:
            while not reader.assembler.is_finished:
                await self._next(reader)
            self._raise_error(reader)
            return reader.assembler.output()
        finally:
            self.leave([reader])

    async def follow(self, reader: Reader) -> AsyncGenerator[RequestOutput, None]:
        """Yield a submitted request's news until it is finished."""
        try:
            finished = False
            while not finished:
                await self._next(reader)
                finished = reader.assembler.is_finished
                self._raise_error(reader)
                news = reader.assembler.take_news()
                if news is not None:
                    yield news
        finally:
            self.leave([reader])

    async def _next(self, reader: Reader) -> None:
        await reader.news.wait()
        reader.news.clear()
        if reader.gone is not None:
            raise reader.gone

    def _raise_error(self, reader: Reader) -> None:
        if reader.assembler.error is not None:
            raise reader.assembler.error

    def leave(self, readers: Sequence[Reader]) -> None:
        """Nobody waits for these requests any more: whatever is unfinished of them is aborted. Harmless twice, and done by `finish` and `follow`."""
        for reader in readers:
            unfinished = tuple(reader.assembler.unfinished_ids)
            if unfinished and not reader.has_left:
                self._commands.put(_Abort(unfinished))
            for request_id in reader.assembler.sequence_ids:
                self._readers.pop(request_id, None)
            reader.leave()

    def _deliver(self, output: StepOutput) -> None:
        """On the event loop: hand a step's updates to their readers."""
        for update in output.updates:
            reader = self._readers.get(update.request_id)
            if reader is None:
                continue
            if reader.deadline is not None:
                reader.deadline.has_begun = True
            try:
                if reader.assembler.absorb(update):
                    self._commands.put(_StopFound(reader.requests[update.choice_index]))
            except Exception as error:  # the other updates of the step must reach their readers
                logger.exception("the answer to %s could not be put together", update.request_id)
                reader.give_up(EngineFaultError(f"the answer could not be put together: {error}"))
            reader.news.set()
        self._report(output.stats)

    def _report(self, stats: StepStats) -> None:
        if self._on_step is not None:
            self._on_step(stats)

    def _run(self) -> None:
        """The engine's thread."""
        try:
            engine = self._load()
            engine.warm_up()
        except BaseException as error:  # noqa: BLE001 - it is raised again where somebody waits for the engine
            self._post(self._fail, error)
            return
        self._engine = engine
        self._post(self._set_state, EngineState.READY)
        try:
            self._serve(engine)
        except BaseException as error:
            logger.critical(
                "the engine has broken down; the server must be started again", exc_info=error
            )
            self._post(self._fail, error)
        finally:
            engine.close()

    def _serve(self, engine: Engine) -> None:
        """Step while there is work, until told to stop."""
        while self._obey_commands(engine):
            output = engine.step()
            if output.fault is not None:
                logger.error(
                    "a step failed; %d requests end with an error",
                    len(output.updates),
                    exc_info=output.fault,
                )
            if output.updates or output.stats.num_tokens:
                self._post(self._deliver, output)

    def _obey_commands(self, engine: Engine) -> bool:
        """Carry out what has come in, waiting for something to do where there is nothing; False when told to stop."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work)
            except queue.Empty:
                return True
            match command:
                case _Add():
                    for request in command.requests:
                        engine.add_request(request, command.arrival_s, command.deadline_s)
                case _Abort():
                    for request_id in command.request_ids:
                        engine.abort_request(request_id)
                case _StopFound():
                    self._end(engine, command.request)
                case _Stop():
                    return False

    def _end(self, engine: Engine, request: Request) -> None:
        """End a sequence that has its whole answer, and report it as the engine reports those that it ends itself."""
        ended = engine.abort_request(request.request_id)
        if ended is not None and ended.metrics is not None and ended.metrics.finished_s is not None:
            times = RequestTimes(
                ended.metrics.arrival_s,
                ended.metrics.first_scheduled_s,
                ended.metrics.first_token_s,
            )
            finished = FinishedRequest(
                FinishReason.STOP.value,
                request.num_prompt_tokens,
                request.num_output_tokens,
                times,
                ended.metrics.finished_s,
            )
            self._post(self._report, StepStats(0, 0, 0, 0.0, finished=[finished]))

    def _set_state(self, state: EngineState) -> None:
        if self._state is EngineState.LOADING:
            self._state = state
            if self._admission.max_tokens is None and self._engine is not None:
                self._admission.max_tokens = QUEUED_CACHES * self._engine.cache_tokens
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """On the event loop: loading raised, or the thread came to an end that it must not come to."""
        if self._state is not EngineState.STOPPED:
            self._state, self._failure = EngineState.FAILED, error
        for reader in set(self._readers.values()):
            reader.give_up(EngineFaultError(f"the engine has broken down: {error}"))
        self._changed.set()

    def _post(self, function: Callable[..., None], *args: object) -> None:
        """Call on the event loop, unless that is closed already, as at the end of a program."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed; nobody reads the engine's output any more")
