"""Worker processes that compile and render one chat template; see sandbox/template_worker.py.

Each call has exclusive use of a process, and may wait for one. A process that reaches a limit ends,
and the next call starts another.
"""

import os
import socket
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.sandbox.limits import reached_limit
from nanovllm.engine.sandbox.messages import Channel, Message, MessageError
from nanovllm.engine.sandbox.spawn import end, spawn

_MAX_PROCESSES = 2
_WALL_S_PER_CPU_S = 20.0  # a busy machine slows the process down
_START_S = 60.0


class TemplateLimitError(Exception):
    """A process has ended. `limit` is "time", "memory" or "stack"; None for another cause."""

    def __init__(self, limit: str | None) -> None:
        super().__init__(limit)
        self.limit = limit


class TemplateInvalidError(Exception):
    """The source is not a valid template."""


@dataclass(slots=True, eq=False)
class _Process:
    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    channel: Channel

    def call(self, header: dict[str, Any], body: bytes, timeout_s: float) -> Message:
        """Send a message and return the reply. Raises TemplateLimitError if the process ends."""
        try:
            self.connection.settimeout(timeout_s)
            self.channel.send(header, body)
            reply = self.channel.receive()
        except TimeoutError:
            self.end()
            raise TemplateLimitError("time") from None
        except (OSError, MessageError):
            reply = None
        if reply is None:
            try:
                code = self.process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                code = None
            self.end()
            raise TemplateLimitError(reached_limit(code))
        return reply

    def end(self) -> None:
        end(self.process, self.connection)


class TemplateProcesses:
    """Renders one template. Thread-safe."""

    def __init__(self, source: str, *, memory_bytes: int) -> None:
        """Start nothing yet. `memory_bytes` limits the memory that a process may add."""
        self._source = source
        self._memory_bytes = memory_bytes
        self._owner = os.getpid()
        self._idle: list[_Process] = []
        self._is_closed = False
        self._free = threading.Semaphore(_MAX_PROCESSES)
        weakref.finalize(self, _end_all, self._idle, self._owner)

    def check(self, cpu_s: float) -> None:
        """Compile the template.

        Raises:
            TemplateInvalidError: the source is invalid.
            TemplateLimitError: compiling reaches a limit.
        """
        with self._free:
            self._put_back(self._take(cpu_s))

    def close(self) -> None:
        """End all processes, those in use after their call. Idempotent.

        A later call starts a process that ends after the call.
        """
        self._is_closed = True
        self._end_idle()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        max_characters: int,
        cpu_s: float,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Message:
        """Return the worker's reply: rendered, refused or failed. Raises as `check`."""
        header = {
            "op": "render", "messages": messages, "special_tokens": special_tokens,
            "max_characters": max_characters, "cpu_s": cpu_s,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }  # fmt: skip
        with self._free:
            process = self._take(cpu_s)
            try:
                reply = process.call(header, b"", cpu_s * _WALL_S_PER_CPU_S)
            except BaseException:
                process.end()
                raise
            self._put_back(process)
        return reply

    def _put_back(self, process: _Process) -> None:
        """Keep a process for the next call."""
        self._idle.append(process)
        if self._is_closed:
            self._end_idle()

    def _end_idle(self) -> None:
        with suppress(IndexError):  # another thread has taken the last one
            while self._idle:
                self._idle.pop().end()

    def _take(self, cpu_s: float) -> _Process:
        """Return a process that has compiled the template."""
        if self._owner != os.getpid():  # forked: the idle processes belong to the parent
            self._owner, self._idle = os.getpid(), []
            weakref.finalize(self, _end_all, self._idle, self._owner)
        while self._idle:
            process = self._idle.pop()
            if process.process.poll() is None:
                return process
            process.end()
        started, connection = spawn("template")
        process = _Process(started, connection, Channel(connection))
        header = {"op": "compile", "memory_bytes": self._memory_bytes, "cpu_s": cpu_s}
        source = self._source.encode("utf-8", "surrogatepass")
        try:
            reply, _ = process.call(header, source, _START_S + cpu_s * _WALL_S_PER_CPU_S)
            if reply["op"] != "compiled":
                raise TemplateInvalidError(reply["message"])
        except BaseException:
            process.end()
            raise
        return process


def _end_all(idle: list[_Process], owner: int) -> None:
    if owner == os.getpid():
        for process in idle:
            process.end()
