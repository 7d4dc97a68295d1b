"""Start and end the workers of grammars: forked from one process that has the tokenizer, or spawned where there is no fork.

One thread uses a launcher.
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
    """What llguidance has to know of a model: tokenizer.json, the size of the vocabulary, and the tokens that end a text."""

    tokenizer_json: str
    n_vocab: int
    eos_token_ids: tuple[int, ...]

    def message(self) -> bytes:
        """Return the message that a worker reads first."""
        header = {"op": "load", "n_vocab": self.n_vocab, "eos_token_ids": self.eos_token_ids}
        return pack(header, self.tokenizer_json.encode())


class Launcher(Protocol):
    """Starts workers by number. `connection` tells what becomes of them; None where there is nothing to read."""

    connection: socket.socket | None

    def start(self, worker: int) -> socket.socket:
        """Start a worker, and return this side's end of its socket. Raises OSError."""

    def kill(self, worker: int) -> None:
        """End a worker at once. Harmless for one that has ended."""

    def slow_down(self, worker: int) -> None:
        """Give a worker only the processor time that nobody else wants."""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield what has arrived: loaded, failed (message), exited (id, code), closed."""

    def exit_code(self, worker: int) -> int | None:
        """Wait for a worker whose socket has closed, where this side is the one to know; None otherwise."""

    def close(self) -> None:
        """End everything. Harmless twice."""


class ForkLauncher:
    """Forks workers from one process."""

    def __init__(self, tokens: Tokens) -> None:
        """Start that process; it reports `loaded` or `failed`. Raises OSError."""
        self._process, self._socket = spawn("fork-server")
        self.connection: socket.socket | None = self._socket
        self._reader = MessageReader()
        self._socket.settimeout(START_S)
        try:
            self._socket.sendall(tokens.message())
        except OSError:
            self.close()
            raise

    def start(self, worker: int) -> socket.socket:
        """See Launcher."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                message = pack({"op": "fork", "id": worker})
                socket.send_fds(self._socket, [message], [theirs.fileno()])
            except OSError:
                ours.close()
                self._process.kill()  # it hangs, and may have read a part of the message
                raise
        return ours

    def kill(self, worker: int) -> None:
        """See Launcher."""
        self._tell("kill", worker)

    def slow_down(self, worker: int) -> None:
        """See Launcher."""
        self._tell("slow", worker)

    def _tell(self, op: str, worker: int) -> None:
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
        """See Launcher: it is reported."""
        return None

    def close(self) -> None:
        """See Launcher."""
        end(self._process, self._socket)


class SpawnLauncher:
    """Spawns each worker by itself."""

    connection: socket.socket | None = None

    def __init__(self, tokens: Tokens) -> None:
        """Start nothing yet."""
        self._tokens = tokens
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, worker: int) -> socket.socket:
        """See Launcher."""
        process, connection = spawn("grammar")
        self._processes[worker] = process
        connection.settimeout(START_S)
        try:
            connection.sendall(self._tokens.message())
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
        """See Launcher: nothing is reported."""
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


def launcher(tokens: Tokens) -> Launcher:
    """Return the launcher for this system. Raises OSError."""
    if hasattr(os, "fork") and hasattr(socket, "send_fds"):
        return ForkLauncher(tokens)
    return SpawnLauncher(tokens)
