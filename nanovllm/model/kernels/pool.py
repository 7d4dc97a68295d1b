"""A few threads that enter one compiled function together.

The thread that calls `run` is number 0; the others wait for work on a lock of the operating system, so an idle pool costs nothing.
Compiled functions release the interpreter's lock, and no Python runs between their beginning and their end.
"""

import threading
from collections.abc import Callable
from typing import Any


class ThreadPool:
    """`threads` threads, this one among them; used by one thread at a time."""

    def __init__(self, threads: int) -> None:
        """Start the other threads."""
        self.threads = threads
        self._begin = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._ended = threading.Semaphore(0)
        self._function: Callable[[Any, int], None] | None = None
        self._record: Any = None
        self._errors: list[BaseException] = []
        for number in range(1, threads):
            threading.Thread(target=self._help, args=(number,), name=f"nanovllm-kernels-{number}", daemon=True).start()

    def run(self, function: Callable[[Any, int], None], record: Any, threads: int) -> None:
        """Call function(record, number) on the first `threads` threads and wait for them; raises what the first of them raised."""
        self._function, self._record = function, record
        helpers = self._begin[: threads - 1]
        for begin in helpers:
            begin.release()
        try:
            function(record, 0)
        finally:
            for _ in helpers:
                self._ended.acquire()
        if self._errors:
            raise self._errors.pop()

    def close(self) -> None:
        """End the other threads."""
        self._function = None
        for begin in self._begin:
            begin.release()
        self._begin = []

    def _help(self, number: int) -> None:
        begin = self._begin[number - 1]
        while True:
            begin.acquire()
            function, record = self._function, self._record
            if function is None:
                return
            try:
                function(record, number)
            except BaseException as error:  # noqa: BLE001 - it is raised where the step is waited for
                self._errors.append(error)
            finally:
                self._ended.release()
