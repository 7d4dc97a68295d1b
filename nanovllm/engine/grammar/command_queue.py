"""Commands for a thread that waits in a selector."""

import contextlib
import queue
import socket
import threading
from collections.abc import Callable


class CommandQueue:
    """Commands that any thread posts and one thread runs, until that thread has ended.

    Attributes:
        woken: socket that is readable when commands are waiting; for the thread's selector.
        lock: held while commands run after the thread's end. Reentrant, because a finalizer may
            post a command while its thread holds it.
        has_ended: whether `post` runs the commands.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake, self.woken = socket.socketpair()
        self._wake.setblocking(False)
        self.woken.setblocking(False)
        self.lock = threading.RLock()
        self.has_ended = False

    def post(self, command: Callable[[], None]) -> None:
        """Run a command on the thread, or here once the thread has ended."""
        self._commands.put(command)
        with contextlib.suppress(BlockingIOError, OSError):  # it is awake, or has ended
            self._wake.send(b".")
        if self.has_ended:
            with self.lock:
                self._run()

    def post_unless_ended(self, command: Callable[[], None]) -> None:
        """Run a command on the thread, or never; for a finalizer, which may run at any moment.

        It waits for no lock, so the thread that runs the finalizer may hold any.
        """
        if not self.has_ended:
            self._commands.put(command)
            with contextlib.suppress(BlockingIOError, OSError):  # it is awake, or has ended
                self._wake.send(b".")

    def run(self) -> None:
        """Run the commands that are waiting; for the thread."""
        with contextlib.suppress(BlockingIOError):
            while self.woken.recv(4096):
                pass
        self._run()

    def end(self) -> None:
        """Run the waiting commands, and have `post` run later ones. Harmless twice."""
        with self.lock:
            self.has_ended = True
            self._run()
            self.close()

    def abandon(self) -> None:
        """Close the sockets in a forked process, where another thread may have held the lock."""
        self.lock = threading.RLock()
        self.has_ended = True
        self.close()

    def close(self) -> None:
        """Close the sockets."""
        self._wake.close()
        self.woken.close()

    def _run(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
