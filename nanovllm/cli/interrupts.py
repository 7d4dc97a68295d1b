"""Signals while code runs that Python's own handlers cannot end quickly or quietly."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HANDLER_S = 0.2
"""Maximum time until Python handles a signal, unless its main thread runs native code."""


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


@contextmanager
def ended_by_second_interrupt() -> Iterator[None]:
    """Let a second Ctrl-C end the process if native code keeps Python from handling the first."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    num_handled = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal num_handled
        num_handled += 1
        signal.default_int_handler(number, frame)

    def watch() -> None:
        last = -1
        while number := os.read(arrivals, 1):  # which Python writes when a signal arrives
            if number[0] != signal.SIGINT:
                continue
            time.sleep(_HANDLER_S)
            if num_handled == last:
                os._exit(130)
            last = num_handled
        os.close(arrivals)

    arrivals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    threading.Thread(target=watch, name="nanovllm-interrupts", daemon=True).start()
    signal.signal(signal.SIGINT, handle)
    previous = signal.set_wakeup_fd(wakeup)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(wakeup)  # which ends the thread


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
