"""A few worker processes of one kind, each in use by one call at a time.

A process starts when a call finds none that is idle. One that has ended or reached a limit is
replaced at the next call.
"""

import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from nanovllm.engine.sandbox.messages import Message
from nanovllm.engine.sandbox.process import START_S, WorkerEndedError, WorkerProcess


class WorkerRefusedError(Exception):
    """A process has refused its first message; `reply` is its answer."""

    def __init__(self, reply: dict[str, Any]) -> None:
        """Store the header of the reply."""
        super().__init__(reply.get("message"))
        self.reply = reply


class ProcessPool:
    """Calls worker processes. Thread-safe."""

    def __init__(
        self,
        module: str,
        load: dict[str, Any],
        body: bytes = b"",
        *,
        max_processes: int = 1,
        start_s: float = START_S,
        idle_s: float | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            module: what the processes run; see WorkerProcess.
            load: header of the first message to each process, which replies "loaded".
            body: its body.
            max_processes: calls beyond them wait.
            start_s: maximum time of the first reply.
            idle_s: time without a call after which the processes end; None for never.
            variables: more variables of their environment.
        """
        self._module, self._load, self._body = module, load, body
        self._start_s, self._idle_s, self._variables = start_s, idle_s, variables
        self._free = threading.Semaphore(max_processes)
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._own_processes()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that run."""
        return [each.pid for each in (*self._idle, *self._busy) if each.is_running]

    def check(self) -> None:
        """Start a process unless one is idle, and raise as `call` does."""
        with self._free:
            self._put_back(self._take())

    def call(self, header: dict[str, Any], *, timeout_s: float) -> Message:
        """Return a process's reply to a message.

        Raises:
            WorkerEndedError: the process ended, by itself or after `timeout_s`.
            WorkerRefusedError: it refused its first message.
            OSError: it cannot be started.
        """
        with self._free:
            process = self._take()
            try:
                reply = process.call(header, timeout_s=timeout_s)
            except BaseException:
                self._end(process)
                raise
            self._put_back(process)
        return reply

    def close(self, *, kills: bool = False) -> None:
        """End all processes. Idempotent.

        Those in use end after their call, and a later call starts a process that ends after it.
        With `kills`, calls raise WorkerEndedError, also those that are running.
        """
        with self._lock:
            self._is_closed = True
            if kills:
                self._refuses_calls = True
            busy = list(self._busy) if kills else []
        for process in busy:
            process.kill()
        self._end_idle()

    def _own_processes(self) -> None:
        """Start without processes; in a forked process, those of the parent are not ours."""
        self._owner = os.getpid()
        self._is_closed = False
        self._refuses_calls = False
        self._idle: list[WorkerProcess] = []
        self._busy: set[WorkerProcess] = set()
        weakref.finalize(self, _end_all, self._idle, self._owner)

    def _take(self) -> WorkerProcess:
        """Return a process that has loaded."""
        if self._owner != os.getpid():
            self._own_processes()
        self._stop_timer()
        while (process := self._pop()) is not None:
            if process.is_running:
                return process
            self._end(process)
        process = WorkerProcess(self._module, self._variables)
        with self._lock:
            self._busy.add(process)
        try:
            if self._refuses_calls:
                raise WorkerEndedError(None)
            reply, _ = process.call(self._load, self._body, timeout_s=self._start_s)
            if reply["op"] != "loaded":
                raise WorkerRefusedError(reply)
        except BaseException:
            self._end(process)
            raise
        return process

    def _pop(self) -> WorkerProcess | None:
        with self._lock:
            if not self._idle:
                return None
            process = self._idle.pop()
            self._busy.add(process)
            return process

    def _put_back(self, process: WorkerProcess) -> None:
        """Keep a process for the next call."""
        with self._lock:
            self._busy.discard(process)
            self._idle.append(process)
        if self._is_closed:
            self._end_idle()
        elif self._idle_s is not None:
            self._timer = threading.Timer(self._idle_s, self._end_idle)
            self._timer.daemon = True
            self._timer.start()

    def _end(self, process: WorkerProcess) -> None:
        with self._lock:
            self._busy.discard(process)
        process.end()

    def _end_idle(self) -> None:
        self._stop_timer()
        while (process := self._pop()) is not None:
            self._end(process)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


def _end_all(idle: list[WorkerProcess], owner: int) -> None:
    if owner == os.getpid():
        for process in idle:
            process.end()
