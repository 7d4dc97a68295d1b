"""Start and end grammar workers.

Workers are forked from one process that has loaded the tokenizer, or spawned where the system has
no fork. A launcher is not thread-safe.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from nanovllm.engine.sandbox.messages import MessageReader, pack
from nanovllm.engine.sandbox.spawn import end, spawn

START_S = 60.0
"""Maximum time that a child process needs to load the library and the tokenizer."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A model's tokens for llguidance: tokenizer.json, vocabulary size and end-of-text tokens."""

    tokenizer_json: str
    n_vocab: int
    eos_token_ids: tuple[int, ...]

    def message(self) -> bytes:
        """Return the `load` message of grammar_worker.py."""
        header = {"op": "load", "n_vocab": self.n_vocab, "eos_token_ids": self.eos_token_ids}
        return pack(header, self.tokenizer_json.encode())


class Launcher(Protocol):
    """Starts workers by number.

    `connection` carries events of the workers, which `read` yields; None where there are none.
    """

    connection: socket.socket | None

    def start(self, worker: int, message: bytes) -> socket.socket:
        """Start a worker and send it its first message.

        Returns the parent's end of its socket. Raises OSError.
        """

    def kill(self, worker: int) -> None:
        """End a worker at once. Does nothing for a worker that has ended."""

    def slow_down(self, worker: int) -> None:
        """Give a worker the lowest priority."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield new events: loaded, failed (message), exited (id, code), closed."""

    def exit_code(self, worker: int) -> int | None:
        """Wait for a worker whose socket has closed; None where `read` reports its exit."""

    def close(self) -> None:
        """End all processes. Idempotent."""


class ForkLauncher:
    """Forks workers from one process."""

    def __init__(self, tokens: Tokens) -> None:
        """Start the fork server, which reports `loaded` or `failed`. Raises OSError."""
        self._process, self._socket = spawn("fork-server")
        self.connection: socket.socket | None = self._socket
        self._reader = MessageReader()
        self._socket.settimeout(START_S)
        try:
            self._socket.sendall(tokens.message())
        except OSError:
            self.close()
            raise

    def start(self, worker: int, message: bytes) -> socket.socket:
        """See Launcher."""
        ours, theirs = socket.socketpair()
        ours.settimeout(START_S)
        try:
            with theirs:
                fork = pack({"op": "fork", "id": worker})
                socket.send_fds(self._socket, [fork], [theirs.fileno()])
            ours.sendall(message)
        except OSError:
            ours.close()
            self._process.kill()  # it hangs, and may have read part of a message
            raise
        return ours

    def kill(self, worker: int) -> None:
        """See Launcher."""
        self._send("kill", worker)

    def slow_down(self, worker: int) -> None:
        """See Launcher."""
        self._send("slow", worker)

    def _send(self, op: str, worker: int) -> None:
        try:
            self._socket.sendall(pack({"op": op, "id": worker}))
        except OSError:  # it has ended, or hangs
            self._process.kill()

    def read(self) -> Iterator[dict[str, Any]]:
        """See Launcher."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            yield {"op": "closed"}
        for header, _ in self._reader.feed(data):
            yield header

    def exit_code(self, worker: int) -> int | None:
        """See Launcher: `read` reports it."""
        return None

    def close(self) -> None:
        """See Launcher."""
        end(self._process, self._socket)


class SpawnLauncher:
    """Spawns each worker as a process of its own."""

    connection: socket.socket | None = None

    def __init__(self, tokens: Tokens) -> None:
        """Prepare to spawn workers with these tokens."""
        self._tokens = tokens
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, worker: int, message: bytes) -> socket.socket:
        """See Launcher."""
        process, connection = spawn("grammar")
        self._processes[worker] = process
        connection.settimeout(START_S)
        try:
            connection.sendall(self._tokens.message() + message)
        except OSError:
            connection.close()
            self.kill(worker)
            raise
        return connection

    def kill(self, worker: int) -> None:
        """See Launcher."""
        process = self._processes.pop(worker, None)
        if process is not None:
            process.kill()
            process.wait()

    def slow_down(self, worker: int) -> None:
        """See Launcher."""
        process = self._processes.get(worker)
        if process is not None and hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, 19)

    def read(self) -> Iterator[dict[str, Any]]:
        """See Launcher: there are no events."""
        return iter(())

    def exit_code(self, worker: int) -> int | None:
        """See Launcher."""
        process = self._processes.pop(worker, None)
        if process is None:
            return None
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def close(self) -> None:
        """See Launcher."""
        for worker in list(self._processes):
            self.kill(worker)


def make_launcher(tokens: Tokens) -> Launcher:
    """Return the launcher for this system. Raises OSError."""
    if hasattr(os, "fork") and hasattr(socket, "send_fds"):
        return ForkLauncher(tokens)
    return SpawnLauncher(tokens)
