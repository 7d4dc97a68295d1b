"""A worker process and the parent's end of its socket.

`call` sends a message and waits for the reply; `send` and `receive` never wait. Use either.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nanovllm.engine.sandbox.limits import reached_limit
from nanovllm.engine.sandbox.messages import NOTE_BYTES, Channel, Message, MessageError, pack

START_S = 60.0
"""Maximum time that a process needs to load its libraries."""

_START = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from nanovllm.engine.sandbox.main import main; "
    "main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)
_EXIT_S = 5.0  # a process whose socket has closed needs as long to end
_LOWEST_PRIORITY = 19


class WorkerEndedError(Exception):
    """A process has ended. `limit` is "time", "memory" or "stack"; None for another cause."""

    def __init__(self, limit: str | None) -> None:
        """Store the limit that the process has reached."""
        super().__init__(limit)
        self.limit = limit


class WorkerProcess:
    """One process. It ends when its socket closes. Not thread-safe."""

    def __init__(self, module: str, variables: Mapping[str, str] | None = None) -> None:
        """Start a process that runs `module.serve(channel)`. Raises OSError.

        It has this one's `sys.path` and its own session. `variables` are more variables of its
        environment.
        """
        ours, theirs = socket.socketpair()
        self._note = -1 if sys.platform == "win32" else _anonymous_file()
        try:
            self._process = _spawn(module, theirs, self._note, variables or {})
        except BaseException:
            ours.close()
            self._close_note()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self._channel = Channel(ours)
        self._unsent = bytearray()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def has_unsent(self) -> bool:
        """Whether the socket has not taken all bytes of `send` yet."""
        return bool(self._unsent)

    def fileno(self) -> int:
        """Return the socket's file descriptor, for a selector; -1 once it is closed."""
        return self._socket.fileno()

    def call(self, header: dict[str, Any], body: bytes = b"", *, timeout_s: float) -> Message:
        """Send a message and return the reply. Raises WorkerEndedError, also after `timeout_s`."""
        try:
            self._socket.settimeout(timeout_s)
            self._channel.send(header, body)
            reply = self._channel.receive()
        except TimeoutError:
            raise WorkerEndedError("time") from None
        except (OSError, MessageError):
            reply = None
        if reply is None:
            raise WorkerEndedError(self._reached_limit())
        return reply

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message; what the socket does not take now, `flush` sends later."""
        self._unsent += pack(header, body)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes without waiting."""
        if self._unsent:
            with suppress(OSError):  # it is full; or has closed, which `receive` reports
                self._socket.setblocking(False)
                while self._unsent:
                    del self._unsent[: self._socket.send(self._unsent)]

    def receive(self) -> list[Message]:
        """Return the messages that have arrived. Raises WorkerEndedError after the last one."""
        try:
            messages = self._channel.receive_ready()
        except (OSError, MessageError):
            messages = None
        if messages is None:
            raise WorkerEndedError(self._reached_limit())
        return messages

    def note(self) -> int:
        """Return the latest number that the process has noted; 0 where there is none."""
        return (
            0 if self._note < 0 else int.from_bytes(os.pread(self._note, NOTE_BYTES, 0), "little")
        )

    def cpu_s(self) -> float:
        """Return the processor time of the process; elapsed time where the system has none."""
        if sys.platform == "linux":
            with suppress(OSError):
                return time.clock_gettime(~self.pid << 3 | 2)  # clock_getcpuclockid(3)
        return time.monotonic()

    def slow_down(self) -> None:
        """Give the process the lowest priority."""
        if hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, _LOWEST_PRIORITY)

    def kill(self) -> None:
        """Kill the process; a call on another thread raises WorkerEndedError."""
        self._process.kill()

    def end(self, *, waits: bool = True) -> None:
        """Kill the process and close its socket. Idempotent.

        Without `waits`, `is_running` reaps the process.
        """
        self._process.kill()
        self.close()
        if waits:
            self._process.wait()

    def close(self) -> None:
        """Close the descriptors: the process ends, unless another one has copies of them."""
        self._socket.close()
        self._close_note()

    def _reached_limit(self) -> str | None:
        """Return the limit that ended the process, which has closed its socket."""
        try:
            return reached_limit(self._process.wait(_EXIT_S))
        except subprocess.TimeoutExpired:
            return None

    def _close_note(self) -> None:
        if self._note >= 0:
            os.close(self._note)
            self._note = -1


def _anonymous_file() -> int:
    """Return the descriptor of an empty file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nanovllm-note")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _spawn(
    module: str, theirs: socket.socket, note: int, variables: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    """Start the process. It does not fork this one's threads."""
    number = 0 if sys.platform == "win32" else theirs.fileno()
    # One arena: others would reserve address space, which counts towards the memory limit.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", **variables}
    command = [sys.executable, "-I", "-c", _START, module, str(number), str(note), *sys.path]
    if sys.platform == "win32":
        process = subprocess.Popen(  # noqa: S603 - this Python, trusted arguments
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(theirs.share(process.pid))
        return process
    return subprocess.Popen(  # noqa: S603 - this Python, trusted arguments
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[number, note],
        start_new_session=True,
    )
