"""Worker processes that compile and render one chat template; see sandbox/template_worker.py.

Each call has a process to itself, for which it may wait. A process that reaches a limit ends, and the next call starts another.
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
_WALL_S_PER_CPU_S = 20.0  # of waiting for a busy machine
_START_S = 60.0


class TemplateLimitError(Exception):
    """A process has reached a limit; `limit` is "time", "memory" or "stack", or None where it ended otherwise."""

    def __init__(self, limit: str | None) -> None:
        super().__init__(limit)
        self.limit = limit


class TemplateInvalidError(Exception):
    """The source is no template."""


@dataclass(slots=True, eq=False)
class _Process:
    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    channel: Channel

    def ask(self, header: dict[str, Any], body: bytes, timeout_s: float) -> Message:
        """Send a message and return the answer; raises TemplateLimitError, and then the process has ended."""
        try:
            self.connection.settimeout(timeout_s)
            self.channel.send(header, body)
            answer = self.channel.receive()
        except TimeoutError:
            self.end()
            raise TemplateLimitError("time") from None
        except (OSError, MessageError):
            answer = None
        if answer is None:
            try:
                code = self.process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                code = None
            self.end()
            raise TemplateLimitError(reached_limit(code))
        return answer

    def end(self) -> None:
        end(self.process, self.connection)


class TemplateProcesses:
    """Renders one template. Any thread may call it."""

    def __init__(self, source: str, *, memory_bytes: int) -> None:
        """Start nothing yet; each process may take `memory_bytes` for its work."""
        self._source = source
        self._memory_bytes = memory_bytes
        self._owner = os.getpid()
        self._idle: list[_Process] = []
        self._is_closed = False
        self._free = threading.Semaphore(_MAX_PROCESSES)
        weakref.finalize(self, _end_all, self._idle, self._owner)

    def check(self, cpu_s: float) -> None:
        """Raise TemplateInvalidError where the source is no template, TemplateLimitError where compiling it takes too much."""
        with self._free:
            self._put_back(self._take(cpu_s))

    def close(self) -> None:
        """End the processes, those in use after their call. Harmless twice.

        A later call starts a process that ends with it.
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
        """Return the worker's answer: rendered, refused or failed. Raises as `check`."""
        header = {
            "op": "render", "messages": messages, "special_tokens": special_tokens,
            "max_characters": max_characters, "cpu_s": cpu_s,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }  # fmt: skip
        with self._free:
            process = self._take(cpu_s)
            try:
                answer = process.ask(header, b"", cpu_s * _WALL_S_PER_CPU_S)
            except BaseException:
                process.end()
                raise
            self._put_back(process)
        return answer

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
        if self._owner != os.getpid():  # those of the process that this one was forked from
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
            answer, _ = process.ask(header, source, _START_S + cpu_s * _WALL_S_PER_CPU_S)
            if answer["op"] != "compiled":
                raise TemplateInvalidError(answer["message"])
        except BaseException:
            process.end()
            raise
        return process


def _end_all(idle: list[_Process], owner: int) -> None:
    if owner == os.getpid():
        for process in idle:
            process.end()
