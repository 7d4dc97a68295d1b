"""Start, limit and end the worker process of a model folder; see worker.py."""

import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.engine.sandbox.limits import reached_limit
from nanovllm.engine.sandbox.messages import Channel, Message, MessageError
from nanovllm.engine.sandbox.spawn import end, spawn
from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestTimeoutError,
)
from nanovllm.inspection.worker import ONE_THREAD

MAX_CPU_S = 30.0
"""Processor time of a call."""
MAX_TSNE_CPU_S = 120.0
IDLE_TIMEOUT_S = 60.0
_WALL_S_PER_CPU_S = 4.0  # a busy machine leaves a process of the lowest priority little time
_START_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class _Process:
    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    channel: Channel

    def end(self) -> None:
        end(self.process, self.connection)


class InspectionWorker:
    """Runs inspections of one model in a process. Thread-safe; calls run one after the other.

    The process starts with the first call and ends after an idle time. One that crashed or exceeded
    a limit is replaced at the next call.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_cpu_s: float = MAX_CPU_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:
        """Start nothing yet.

        Args:
            folder: the model.
            max_cpu_s: maximum processor time of a call; t-SNE has MAX_TSNE_CPU_S instead.
            idle_timeout_s: time without a call after which the process ends.
        """
        self._folder = folder
        self._max_cpu_s = max_cpu_s
        self._idle_timeout_s = idle_timeout_s
        self._lock = threading.Lock()
        self._running: _Process | None = None
        self._timer: threading.Timer | None = None
        self._is_closed = False

    def run(self, name: str, arguments: Mapping[str, Any]) -> bytes:
        """Return the JSON of `responses.run`; it blocks.

        Raises:
            InvalidRequestError: the arguments are invalid, or the call needs too much memory.
            RequestTimeoutError: the call took longer than its limit.
            EngineFaultError: the process failed.
            EngineNotReadyError: the worker is closed.
        """
        with self._lock:
            if self._is_closed:
                raise EngineNotReadyError("the server is stopping")
            self._stop_timer()
            if self._running is not None and self._running.process.poll() is not None:
                self._end()  # it crashed while idle
            running = self._running or self._start()
            is_tsne = arguments.get("method") == "tsne"
            cpu_s = MAX_TSNE_CPU_S if is_tsne else self._max_cpu_s
            header = {"op": "run", "name": name, "arguments": dict(arguments), "cpu_s": cpu_s}
            try:
                reply, body = self._call(running, header, cpu_s * _WALL_S_PER_CPU_S)
            except BaseException:
                self._end()
                raise
            self._start_timer()
        if reply["op"] == "failed":
            raise _error(reply)
        return body

    def close(self) -> None:
        """End the process; a running call fails. Idempotent."""
        self._is_closed = True
        running = self._running
        if running is not None:
            running.process.kill()
        if self._lock.acquire(timeout=_CLOSE_TIMEOUT_S):
            try:
                self._stop_timer()
                self._end()
            finally:
                self._lock.release()

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        running = self._running
        is_alive = running is not None and running.process.poll() is None
        return running.process.pid if running is not None and is_alive else None

    def _start(self) -> _Process:
        """Start a process and wait until it has loaded the model."""
        try:
            process, connection = spawn(str(self._folder), "nanovllm.inspection.worker", ONE_THREAD)
        except OSError as error:
            raise EngineFaultError(f"the inspection process cannot start: {error}") from error
        self._running = _Process(process, connection, Channel(connection))
        try:
            reply, _ = self._call(self._running, None, _START_TIMEOUT_S)
            if reply["op"] != "ready":
                raise _error(reply)
        except BaseException:
            self._end()
            raise
        return self._running

    def _call(self, running: _Process, header: dict[str, Any] | None, timeout_s: float) -> Message:
        """Send a message, if there is one, and return the next reply."""
        try:
            running.connection.settimeout(timeout_s)
            if header is not None:
                running.channel.send(header)
            reply = running.channel.receive()
        except TimeoutError:
            raise _timeout_error(timeout_s) from None
        except (OSError, MessageError):
            reply = None
        if reply is None:
            if self._is_closed:
                raise EngineNotReadyError("the server is stopping")
            limit = None if header is None else reached_limit(_exit_code(running))
            if header is not None and limit == "time":
                raise _timeout_error(header["cpu_s"])
            if limit == "memory":
                raise InvalidRequestError(
                    "the inspection process ran out of memory; shorten the prompt, or ask for less"
                )
            raise EngineFaultError("the inspection process ended unexpectedly; try again")
        return reply

    def _end(self) -> None:
        if self._running is not None:
            self._running.end()
            self._running = None

    def _start_timer(self) -> None:
        self._timer = threading.Timer(self._idle_timeout_s, self._end_idle)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_idle(self) -> None:
        """End the process, on the timer's thread, unless a call came first."""
        with self._lock:
            if self._timer is threading.current_thread():
                self._timer = None
                self._end()


def _error(reply: Mapping[str, Any]) -> InvalidRequestError | EngineFaultError:
    if reply["kind"] == "invalid":
        return InvalidRequestError(reply["message"], param=reply["param"])
    return EngineFaultError(reply["message"])


def _exit_code(running: _Process) -> int | None:
    """Return the exit code of a process whose socket has closed; None if it still runs."""
    try:
        return running.process.wait(timeout=_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None


def _timeout_error(limit_s: float) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the inspection took longer than {limit_s:g} s, the limit; shorten the prompt, or ask for "
        "less",
        has_begun=True,
    )
