"""Calls of the reader's code inside a running engine: what goes wrong there becomes a clear error.

The code runs in the engine's own process, on its threads. An exception, a wrong result or a loop
that does not stop ends the requests of the step, and the server goes on. A call of a library in C
that does not return cannot be ended: then the engine fails, or the process ends.
"""

import ctypes
import faulthandler
import inspect
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import numpy as np

from nanovllm.errors import EngineFaultError
from nanovllm.learn.readers_lines import readers_lines

P = ParamSpec("P")
T = TypeVar("T")
STEP_S, TEXT_S = 60.0, 5.0
"""Time of a forward pass or of sampling; of the scheduler, the block manager or streamed text."""
GRACE_S = 5.0
"""Time in which a call must end after its limit; it is stuck then."""
_POLL_S = 0.1


class ReadersFaultError(EngineFaultError):
    """The reader's code has failed in a running engine; the message names its place."""


OnStuck: TypeAlias = Callable[[ReadersFaultError, int], None]
"""Called, on another thread, with the error of a call that does not end, and its thread's id."""


class _Call(NamedTuple):
    """A running call: the function, its time and the end of that, by `time.monotonic()`."""

    function: Any
    limit_s: float
    deadline_s: float


class _OvertimeError(BaseException):
    """Ends a call that takes too long; the reader's `except Exception` does not catch it."""


class Guard:
    """Calls functions of the files in one folder.

    A thread ends calls that take too long. It raises an exception in the caller's thread, which
    ends a loop in Python, but not one inside a library in C: that is reported. If the library holds
    the interpreter's lock too, no thread of Python runs, and faulthandler ends the process.

    Attributes:
        not_finite: the first function of a forward pass whose result is not finite; otherwise None.
    """

    def __init__(self, folder: Path, on_stuck: OnStuck | None = None) -> None:
        """Name the files of `folder` in messages; report nothing by default."""
        self.not_finite: Any = None
        self._folder = folder.resolve()
        self._on_stuck = on_stuck
        self._lock = threading.Lock()
        self._calls: dict[int, _Call] = {}  # by thread
        self._overtime: set[int] = set()  # threads in which an exception was raised
        self._stuck: set[int] = set()  # threads whose call was reported
        self._has_watcher = self._is_armed = False

    def call(
        self, limit_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return the result of a call; raise ReadersFaultError if it raises or takes too long.

        A call inside another one has the limit of that one.
        """
        thread = threading.get_ident()
        if thread in self._calls:
            return function(*args, **kwargs)
        try:
            try:
                self._begin(thread, _Call(function, limit_s, time.monotonic() + limit_s))
                return function(*args, **kwargs)
            finally:
                self._end(thread)
        except ReadersFaultError:
            raise
        except _OvertimeError as error:
            self._end(thread)  # again: it may have been raised there
            text = f"it did not end within {limit_s:g} s; is there a loop that does not stop?"
            raise self._fault(function, error, text) from None
        except BaseException as error:  # such as SystemExit, which would end the server
            is_main = threading.current_thread() is threading.main_thread()
            if isinstance(error, KeyboardInterrupt) and is_main:
                raise
            text = f"{type(error).__name__}: {error}"
            raise self._fault(function, error, text) from error

    def _fault(
        self, function: Any, source: BaseException | FrameType, text: str
    ) -> ReadersFaultError:
        """Return an error that names the last line of the reader's files that led to `source`."""
        lines = readers_lines(source, self._folder)
        if not lines:
            return wrong(function, text)
        places = [f"{Path(one.filename).name}, line {one.lineno}, in {one.name}" for one in lines]
        caller = f"; called from {places[-2]}" if len(places) > 1 else ""
        return ReadersFaultError(f"{places[-1]}: {text} (the line: {lines[-1].line}{caller})")

    def _begin(self, thread: int, call: _Call) -> None:
        self._calls[thread] = call
        if self._is_armed:
            return
        with self._lock:
            self._limit_silence()
            is_first, self._has_watcher = not self._has_watcher, True
        if is_first:
            threading.Thread(target=self._watch, name="nanovllm-learn-guard", daemon=True).start()

    def _end(self, thread: int) -> None:
        with self._lock:
            self._calls.pop(thread, None)
            self._stuck.discard(thread)
            if thread in self._overtime:  # it may not have been raised yet
                self._overtime.discard(thread)
                _raise_in(thread, None)

    def _watch(self) -> None:
        """End calls that take too long, until there has been none for a while."""
        last_s = time.monotonic()
        while True:
            time.sleep(_POLL_S)
            with self._lock:
                now = time.monotonic()
                self._is_armed = False
                calls = list(self._calls.items())
                last_s = now if calls else last_s
                self._limit_silence(has_calls=bool(calls))
                if now - last_s > STEP_S:
                    self._has_watcher = False
                    return
                for thread, call in calls:
                    if now > call.deadline_s:  # again at each poll: the reader's code may catch it
                        self._overtime.add(thread)
                        _raise_in(thread, _OvertimeError)
                    if now > call.deadline_s + GRACE_S:
                        self._report(thread, call)

    def _report(self, thread: int, call: _Call) -> None:
        """Report a call that goes on although an exception was raised in its thread, once."""
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the documented way
        if self._on_stuck is None or frame is None or thread in self._stuck:
            return
        self._stuck.add(thread)
        text = (
            f"it did not end within {call.limit_s:g} s, and cannot be interrupted: it waits for a "
            "library"
        )
        self._on_stuck(self._fault(call.function, frame, text), thread)

    def _limit_silence(self, *, has_calls: bool = True) -> None:
        """While there are calls, let faulthandler end the process if the watcher cannot run."""
        if self._on_stuck is None or sys.__stderr__ is None:
            return
        self._is_armed = has_calls
        if has_calls:
            faulthandler.dump_traceback_later(STEP_S + GRACE_S, file=sys.__stderr__, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()


def wrong(function: Any, text: str) -> ReadersFaultError:
    """Return the error for a wrong result of a function, with its place."""
    plain = inspect.unwrap(function)
    code = getattr(plain, "__code__", None)
    name = getattr(plain, "__qualname__", None) or type(plain).__name__
    if isinstance(plain, type):
        return ReadersFaultError(f"{plain.__module__.rpartition('.')[2]}.py, in {name}: {text}")
    if code is None:
        return ReadersFaultError(f"{name}: {text}")
    place = f"{Path(code.co_filename).name}, line {code.co_firstlineno}, in {name}"
    return ReadersFaultError(f"{place}: {text}")


def check_array(
    function: Any, found: object, shape: tuple[int, ...]
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return what `function` has returned as float32; it must be an array of this shape."""
    if not isinstance(found, np.ndarray):
        text = f"it returned a {type(found).__name__}, expected an array of shape {shape}"
        raise wrong(function, text)
    if found.shape != shape:
        raise wrong(function, f"it returned an array of shape {found.shape}, expected {shape}")
    if found.dtype == np.float32:
        return found
    if found.dtype.kind not in "fiu":
        raise wrong(function, f"it returned elements of type {found.dtype}, expected float32")
    return found.astype(np.float32)


def check_int(function: Any, found: object, limit: int) -> int:
    """Return what `function` has returned as an int; it must be from 0 to limit - 1."""
    if not isinstance(found, int | np.integer) or isinstance(found, bool):
        text = f"it returned a {type(found).__name__}, expected a whole number"
        raise wrong(function, text)
    if not 0 <= found < limit:
        raise wrong(function, f"it returned {found}, expected 0 to {limit - 1}")
    return int(found)


def check_text(function: Any, found: object) -> str:
    """Return what `function` has returned, which must be text."""
    if not isinstance(found, str):
        raise wrong(function, f"it returned a {type(found).__name__}, expected text")
    return found


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next line of Python; None takes it back."""
    kind = None if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)
