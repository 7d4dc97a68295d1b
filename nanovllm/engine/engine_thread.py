"""EngineThread: the thread that loads an engine and steps it. No other thread uses the engine.

Commands (calls with the engine, and stop) enter through one queue, which is drained between steps.
Outputs leave through callbacks, which the thread schedules on the event loop. A frozen snapshot of
the statistics is published when a step is planned and when it has ended; any thread may read it.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import EngineSnapshot
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.step_output import StepOutput
from nanovllm.errors import EngineError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Command: TypeAlias = tuple[Callable[[Engine], object], bool]
MAX_STEP_END_S = 10.0
"""Maximum time that `join` waits for the current step."""
_IDLE_POLL_S = 0.05


class EngineThread:
    """Runs one engine. Any thread may call its methods; callbacks run on the event loop.

    Attributes:
        is_paused: whether the thread waits for commands although there is work. Only calls on the
            engine's thread change it.
        num_commands: number of commands that have changed the engine.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        on_ready: Callable[[Engine], None],
        on_output: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Prepare to run the engine that `load` returns.

        Args:
            on_ready: called with the engine after a first step.
            on_output: called with the output of each step.
            on_failure: called with the exception of `load`, or with one that ends the thread.
        """
        self._load = load
        self._on_ready = on_ready
        self._on_output = on_output
        self._on_failure = on_failure
        # (call, whether it changes the engine); None stops the thread.
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._snapshot: EngineSnapshot | None = None
        self._calls: set[Future[Any]] = set()
        self.is_paused = False
        self.num_commands = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def snapshot(self) -> EngineSnapshot:
        """The engine's statistics as of its last step or command, once it is ready."""
        assert self._snapshot is not None
        return self._snapshot

    @property
    def is_alive(self) -> bool:
        """Whether the thread was started and has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, with callbacks on `loop`; return at once."""
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        self._thread.start()

    def add(
        self, requests: tuple[Request, ...], arrival_s: float, deadline_s: float | None
    ) -> None:
        """Queue sequences with new ids."""

        def add_all(engine: Engine) -> None:
            for request in requests:
                engine.add_request(request, arrival_s, deadline_s)

        self._commands.put((add_all, True))

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Finish a sequence if it is unfinished."""
        self._commands.put((lambda engine: engine.finish_request(request_id, reason), True))

    def run(self, call: Callable[[Engine], object]) -> None:
        """Run a call on the engine's thread between two steps; it must not raise."""
        self._commands.put((call, False))

    async def call(self, call: Callable[[Engine], T]) -> T:
        """Return the result of a call that runs on the engine's thread between two steps.

        Raises EngineNotReadyError if the thread ends before, and the exception of the call.
        """
        future: Future[T] = Future()

        def run(engine: Engine) -> None:
            with suppress(InvalidStateError):  # nobody waits any more
                try:
                    future.set_result(call(engine))
                except Exception as error:  # noqa: BLE001 - raised by the future
                    future.set_exception(error)

        self._calls.add(future)
        try:
            self.run(run)
            return await asyncio.wrap_future(future)
        finally:
            self._calls.discard(future)

    def fail_calls(self, error: EngineError) -> None:
        """Make `call` raise `error`; call it when the thread ends."""
        for future in self._calls:
            with suppress(InvalidStateError):
                future.set_exception(error)

    def fail(self, error: EngineError, thread: int) -> bool:
        """Report that the thread is stuck in a step; any thread may call this.

        Returns False, and does nothing, unless `thread` is the id of this one.
        """
        if self._thread is None or self._thread.ident != thread:
            return False
        logger.critical("the engine failed; restart the server: %s", error)
        self._post(self._on_failure, error)
        return True

    def stop(self) -> None:
        """End the thread after the current step."""
        self._commands.put(None)

    async def join(self) -> None:
        """Wait for the end of the thread, at most MAX_STEP_END_S."""
        give_up_s = time.monotonic() + MAX_STEP_END_S
        while self.is_alive:
            if time.monotonic() >= give_up_s:
                logger.warning("the step still runs after %g s; not waiting for it", MAX_STEP_END_S)
                return
            await asyncio.sleep(0.005)

    def _run(self) -> None:
        try:
            engine = self._load()
            engine.warm_up()
        except BaseException as error:  # noqa: BLE001 - raised again in wait_until_ready
            self._post(self._on_failure, error)
            return
        self._snapshot = engine.stats()
        self._post(self._on_ready, engine)
        try:
            self._serve(engine)
        except BaseException as error:
            logger.critical("the engine failed; restart the server", exc_info=error)
            self._post(self._on_failure, error)
        finally:
            engine.close()
            # Break the reference cycle with the owner of the callbacks.
            del self._load, self._on_ready, self._on_output, self._on_failure

    def _serve(self, engine: Engine) -> None:
        """Step while there is work, until a command stops the thread; then end all requests."""
        while self._drain_commands(engine):
            self.step(engine)
        for request_id in engine.scheduler.request_ids:
            engine.finish_request(request_id, FinishReason.ABORT)
        self._snapshot = engine.stats()

    def step(self, engine: Engine) -> None:
        """Run one step and post its output; call it on the engine's thread only."""

        def publish() -> None:
            self._snapshot = engine.stats()

        output = engine.step(publish)
        publish()
        if output.updates or output.stats.num_tokens:
            self._post(self._on_output, output)

    def _drain_commands(self, engine: Engine) -> bool:
        """Run the queued commands; return False for `stop`.

        Wait for a command if there is no work, or if the engine is paused.
        """
        has_changed = False
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                if has_changed:
                    self._snapshot = engine.stats()
                if engine.has_work and not self.is_paused:
                    return True
                command = self._wait_for_command(engine)
            if command is None:
                return False
            call, is_change = command
            call(engine)
            self.num_commands += is_change
            has_changed = has_changed or is_change

    def _wait_for_command(self, engine: Engine) -> _Command | None:
        """Wait for a command; meanwhile end compilations that no sequence needs."""
        grammars = engine.input_processor.grammars
        while grammars.is_compiling:
            with suppress(queue.Empty):
                return self._commands.get(timeout=_IDLE_POLL_S)
            grammars.poll()
        return self._commands.get()

    def _post(self, function: Callable[..., None], *args: object) -> None:
        """Call `function` on the event loop, unless it is closed, as at the end of a program."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed; the engine's output is dropped")
