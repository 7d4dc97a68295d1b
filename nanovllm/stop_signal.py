"""End a run between two steps at Ctrl-C, or when the process is asked to terminate."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Within its context, the first SIGINT or SIGTERM is recorded; a second one acts as usual.

    Signals can be caught in the main thread only. In other threads nothing changes.

    Attributes:
        number: number of the signal; None before it.
    """

    def __init__(self) -> None:
        """Record no signal yet."""
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def is_requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    def __enter__(self) -> "StopSignal":
        """Catch the signals."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # A handler of None was installed by C code and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
