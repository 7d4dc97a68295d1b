"""CallRunner: blocking calls from any number of threads, run by one engine in one batch.

A call passes its requests to a worker thread and waits until all of them have ended. The worker
steps the engine for all calls. It ends when there are none, so an idle engine has no thread. No
other thread uses the engine meanwhile. An exception in the calling thread, such as
KeyboardInterrupt, never interrupts a step: it ends the requests of that call only.

The garbage collector may close an abandoned stream in any thread at any time, even while that
thread holds `_lock`. The worker therefore takes the lock only before it ends, when no call waits
for it. It wakes threads through queues, whose `put` does not block while a thread is in `get`.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.update_router import UpdateRouter
from nanovllm.errors import EngineNotReadyError
from nanovllm.outputs import RequestOutput

_POLL_S = 0.1
"""Maximum time of one wait: on Windows a wait without a timeout cannot be interrupted."""

OnStep: TypeAlias = Callable[[StepStats, int], None]
ItemT = TypeVar("ItemT")


@dataclass(slots=True, eq=False)
class _Call(Generic[ItemT]):
    """The requests of one call, and the state that its thread waits for.

    Attributes:
        prompts: the prompts of the requests.
        report: returns what the thread gets of a step, from its statistics and the number of
            prompts of the call that it ended; None for nothing. The worker calls it.
        raises_errors: whether an error that ends a prompt ends the call.
        items: what the thread has not taken yet.
        num_unfinished: number of prompts that have not ended.
        num_ended: prompts that have ended since the last step that was reported.
        changed: queue into which the worker puts an item to wake the thread.
        has_ended: whether the engine has removed all sequences of the call.
        error: the exception that ended the call early.
    """

    prompts: Sequence[PromptRequest]
    report: Callable[[StepStats, int], ItemT | None]
    raises_errors: bool = False
    items: deque[ItemT] = field(default_factory=deque)
    num_unfinished: int = field(init=False)
    num_ended: int = 0
    changed: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)
    has_ended: bool = False
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.prompts)

    def wait(self) -> None:
        """Wait until the worker wakes this thread, or for `_POLL_S`."""
        with contextlib.suppress(queue.Empty):
            self.changed.get(timeout=_POLL_S)
            while True:
                self.changed.get_nowait()

    def wake(self) -> None:
        """Wake the thread, unless a wake-up is pending."""
        if self.changed.empty():
            self.changed.put(None)


class CallRunner:
    """Runs calls on an engine, which no other code may step meanwhile."""

    def __init__(self, engine: Engine) -> None:
        """Start without a thread."""
        self._engine = engine
        self._commands: deque[Callable[[], None]] = deque()  # for the worker, before its next step
        self._lock = threading.RLock()  # held briefly; guards _worker and _is_closed
        self._worker: threading.Thread | None = None
        self._is_closed = False
        # Only the worker uses these three. Prompts are held back until there is room for their
        # grammars.
        self._calls: set[_Call[Any]] = set()
        self._held_back: dict[PromptRequest, None] = {}
        self._router: UpdateRouter[_Call[Any]] = UpdateRouter(engine.finish_request)

    def run(self, prompts: Sequence[PromptRequest], on_step: OnStep | None = None) -> None:
        """Return when all prompts have ended.

        An error that ends one prompt is stored in it and not raised, unless the request was refused
        before it ran. If this method raises, unfinished prompts are aborted.

        Args:
            prompts: the prompts.
            on_step: called in this thread with the statistics of each step and the number of
                prompts that it ended.

        Raises:
            EngineNotReadyError: the CallRunner is closed.
            InvalidRequestError: a grammar is invalid.
        """
        call: _Call[tuple[StepStats, int]] = _Call(
            prompts, lambda *step: None if on_step is None else step
        )
        if not prompts:
            return
        for stats, num_ended in self._items(call):
            assert on_step is not None
            on_step(stats, num_ended)

    def stream(self, prompt: PromptRequest) -> Generator[RequestOutput, None, None]:
        """Yield the deltas of one prompt. Closing the generator aborts the request.

        Raises the error of the request, and EngineNotReadyError if the CallRunner is closed.
        """
        return self._items(_Call([prompt], lambda *_: prompt.take_delta(), raises_errors=True))

    def close(self) -> None:
        """End every call with EngineNotReadyError, refuse new ones, and wait for the current step.

        A second call has no effect.
        """
        with self._lock:
            self._is_closed = True
        worker = self._worker
        while worker is not None and worker.is_alive() and worker is not threading.current_thread():
            worker.join(_POLL_S)
            worker = self._worker  # None after a calling thread that acted as the worker
        with contextlib.suppress(AttributeError):
            del self._engine, self._router  # frees the engine's memory

    def _items(self, call: _Call[ItemT]) -> Generator[ItemT, None, None]:
        """Run a call; yield its items, and raise the error that ended it early.

        Closing the generator aborts unfinished requests.
        """
        try:
            self._submit(call)
            has_ended = False
            while not has_ended:
                call.wait()
                has_ended = call.has_ended
                while call.items:
                    yield call.items.popleft()
        finally:
            self._cancel(call)
        if call.error is not None:
            raise call.error

    def _submit(self, call: _Call[Any]) -> None:
        """Pass the call to the worker, and start one if there is none."""
        with self._lock:
            if self._is_closed:
                call.has_ended = True
                raise _closed_error()
            self._commands.append(partial(self._begin_call, call))
            if self._worker is not None and self._worker.is_alive():
                return
            self._worker = threading.Thread(target=self._work, name="nanovllm-llm")
            try:
                self._worker.start()
                return
            except RuntimeError:  # no more threads can be started, as at the end of a program
                self._worker = threading.current_thread()
        try:
            self._work()
        finally:
            self._worker = None

    def _cancel(self, call: _Call[Any]) -> None:
        """Abort the call's requests, which waits at most for the current step."""
        if call.has_ended:
            return
        self._commands.append(partial(self._finish_call, call, None))
        worker = self._worker
        if worker is threading.current_thread():
            return  # the worker collected a generator; it ends the call before its next step
        while not call.has_ended and worker is not None and worker.is_alive():
            call.wait()

    def _work(self) -> None:
        """Serve calls until there are none; the worker's main function."""
        while True:
            while self._commands:
                self._commands.popleft()()
            for call in list(self._calls) if self._is_closed else ():
                self._finish_call(call, _closed_error())
            if self._calls:
                self._try_step()
                continue
            with self._lock:
                if not self._commands:
                    self._worker = None
                    return

    def _begin_call(self, call: _Call[Any]) -> None:
        """Queue the prompts of a call."""
        self._calls.add(call)
        try:
            self._router.add(call.prompts, call)
            for prompt in call.prompts:
                self._add_or_hold_back(prompt)
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that waits
            self._finish_call(call, error)

    def _add_or_hold_back(self, prompt: PromptRequest) -> None:
        """Queue the sequences of a prompt, if its grammar may be compiled now."""
        if prompt.has_grammar and self._engine.input_processor.grammars.is_full:
            self._held_back[prompt] = None
            return
        self._held_back.pop(prompt, None)
        for request in prompt.requests:
            self._engine.add_request(request)

    def _try_step(self) -> None:
        """Step the engine once, and pass its updates to their calls; end all if it raises."""
        try:
            for prompt in list(self._held_back):
                self._add_or_hold_back(prompt)
            output = self._engine.step()
            for prompt, call in self._router.add_updates(output):
                if prompt.error is not None and (call.raises_errors or prompt.is_refused):
                    self._finish_call(call, prompt.error)
                elif prompt.is_finished:
                    call.num_unfinished -= 1
                    call.num_ended += 1
            for call in list(self._calls):
                self._report(call, output.stats)
        except BaseException as error:  # noqa: BLE001 - raised in every waiting thread
            for call in list(self._calls):
                self._finish_call(call, error)

    def _report(self, call: _Call[Any], stats: StepStats) -> None:
        """Wake a call's thread if the step has changed or ended the call."""
        item = call.report(stats, call.num_ended)
        call.num_ended = 0
        if item is not None:
            call.items.append(item)
        if not call.num_unfinished:
            self._calls.discard(call)
            call.has_ended = True
        if call.items or call.has_ended:
            call.wake()

    def _finish_call(self, call: _Call[Any], error: BaseException | None) -> None:
        """Abort the unfinished prompts of a call, and wake its thread."""
        self._calls.discard(call)
        try:
            for prompt in call.prompts:
                self._held_back.pop(prompt, None)
                self._router.remove(prompt)
        except Exception as failure:  # noqa: BLE001 - it is raised in the thread that waits
            error = error or failure
        finally:
            if not call.has_ended:
                call.error, call.has_ended = error, True
            call.wake()


def _closed_error() -> EngineNotReadyError:
    return EngineNotReadyError("this LLM is closed; make another one")
