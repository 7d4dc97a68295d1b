"""A clock for the speed of a run."""

import signal
import threading
import time
from types import FrameType
from typing import Any


class RunClock:
    """A monotonic clock that leaves out the time in which the process was stopped.

    A process that continues after Ctrl-Z or SIGSTOP gets SIGCONT. The time since the clock was last
    read is then left out; this is at most one step too much. The monotonic clocks of Linux and
    macOS stand still while the machine sleeps. While it is entered, in the main thread, the clock
    catches SIGCONT.
    """

    def __init__(self) -> None:
        self._left_out_s = 0.0
        self._read_s = time.perf_counter()
        self._previous: Any = None

    def read_s(self) -> float:
        """Return the seconds on the clock."""
        self._read_s = time.perf_counter()
        return self._read_s - self._left_out_s

    def __enter__(self) -> "RunClock":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and hasattr(signal, "SIGCONT"):
            self._previous = signal.signal(signal.SIGCONT, self._leave_out)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGCONT, self._previous)
            self._previous = None

    def _leave_out(self, number: int, frame: FrameType | None) -> None:
        now_s = time.perf_counter()
        self._left_out_s += now_s - self._read_s
        self._read_s = now_s
