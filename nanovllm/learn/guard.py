"""Calls of the reader's code inside a running engine: what goes wrong there becomes a clear error.

The code runs in the engine's own process, on its threads. An exception, a wrong result or a loop
that does not stop ends the requests of the step, and the server goes on.
"""

import ctypes
import inspect
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from nanovllm.errors import EngineFaultError
from nanovllm.learn.readers_lines import readers_lines

P = ParamSpec("P")
T = TypeVar("T")
STEP_S, TEXT_S = 60.0, 5.0
"""Time of a forward pass or of sampling; of the scheduler, the block manager or streamed text."""
_POLL_S = 0.1


class ReadersFaultError(EngineFaultError):
    """The reader's code has failed in a running engine; the message names its place."""


class _OvertimeError(BaseException):
    """Ends a call that takes too long; the reader's `except Exception` does not catch it."""


class Guard:
    """Calls functions of the files in one folder.

    A thread ends calls that take too long. It raises an exception in the caller's thread, which
    ends a loop in Python, but not one inside a library in C.
    """

    def __init__(self, folder: Path) -> None:
        """Name the files of `folder` in messages."""
        self._folder = folder.resolve()
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}  # of the running calls, by thread
        self._overtime: set[int] = set()  # threads in which an exception was raised
        self._has_watcher = False

    def call(
        self, limit_s: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return the result of a call; raise ReadersFaultError if it raises or takes too long.

        A call inside another one has the limit of that one.
        """
        thread = threading.get_ident()
        if thread in self._deadlines:
            return function(*args, **kwargs)
        try:
            try:
                self._begin(thread, limit_s)
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

    def _fault(self, function: Any, error: BaseException, text: str) -> ReadersFaultError:
        """Return an error that names the last line of the reader's files that led to it."""
        lines = readers_lines(error, self._folder)
        if not lines:
            return wrong(function, text)
        places = [f"{Path(one.filename).name}, line {one.lineno}, in {one.name}" for one in lines]
        caller = f"; called from {places[-2]}" if len(places) > 1 else ""
        return ReadersFaultError(f"{places[-1]}: {text} (the line: {lines[-1].line}{caller})")

    def _begin(self, thread: int, limit_s: float) -> None:
        self._deadlines[thread] = time.monotonic() + limit_s
        if self._has_watcher:
            return
        with self._lock:
            is_first, self._has_watcher = not self._has_watcher, True
        if is_first:
            threading.Thread(target=self._watch, name="nanovllm-learn-guard", daemon=True).start()

    def _end(self, thread: int) -> None:
        with self._lock:
            self._deadlines.pop(thread, None)
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
                last_s = now if self._deadlines else last_s
                if now - last_s > STEP_S:
                    self._has_watcher = False
                    return
                for thread, deadline_s in list(self._deadlines.items()):
                    if now > deadline_s:  # again at each poll: the reader's code may catch it
                        self._overtime.add(thread)
                        _raise_in(thread, _OvertimeError)


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
