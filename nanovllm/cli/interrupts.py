"""Signals while code runs that Python's own handlers cannot end quickly or quietly."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once, without a traceback.

    Python's handler runs between two of its instructions: native code delays it, and an import
    prints a traceback.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_hangups() -> None:
    """Ignore SIGHUP, which asks a server to reload, until the server has started.

    It ends the process if it says that the terminal was closed. Where SIGHUP is ignored already, as
    under nohup, nothing changes.
    """
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    is_main = threading.current_thread() is threading.main_thread()
    if hangup is None or not is_main or signal.getsignal(hangup) is not signal.SIG_DFL:
        return
    from nanovllm.cli.service_manager import Terminal

    terminal = Terminal()

    def handle(number: int, frame: FrameType | None) -> None:
        if terminal.was_closed():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(hangup, handle)
