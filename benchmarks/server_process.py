"""Run `nanovllm serve` in its own process, and check the engine's integrity at its end.

As a program it runs the command and keeps the engine. When a signal has ended the command and the
engine's thread, it checks the engine's integrity and prints a line of JSON.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nanovllm.cli.main import main
from nanovllm.engine.engine import Engine

START_TIMEOUT_S = 300.0  # where the kernels were never compiled before
END_TIMEOUT_S = 60.0
_START_INTERVAL_S = 0.05
_MAX_LOG_BYTES = 8 << 20
_LIMIT = re.compile(r"(RLIMIT_[A-Z]+)=(\d+)")
_ROOT = Path(__file__).resolve().parents[1]


class ServerProcess:
    """A server as a context manager, with `port`, `pid` and `end()`."""

    def __init__(
        self,
        flags: Sequence[str],
        limits: Mapping[str, int] | None = None,
    ) -> None:
        """Start on entering, on a free port; what it prints goes to files, which `end` reads.

        Args:
            limits: of its process, by name in the module resource, such as {"RLIMIT_NOFILE": 64}.
        """
        self._flags = flags
        self._limits = [f"{name}={value}" for name, value in (limits or {}).items()]
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._output, self._errors = (Path(self._folder.name, name) for name in ("out", "err"))
        self._process: subprocess.Popen[str]
        self.port = 0

    def __enter__(self) -> "ServerProcess":
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), *self._limits, *self._flags, "--port", "0"],
                stdout=output, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        end_s = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < end_s:
            match = re.search(r"^Serving on http://[^ ]*:(\d+) ", _tail(self._output), re.MULTILINE)
            if match:
                self.port = int(match[1])
                return self
            time.sleep(_START_INTERVAL_S)
        message = _tail(self._errors)[-3000:]
        self.__exit__(None, None, None)
        raise ServerNotStartedError(message)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    @property
    def log_bytes(self) -> int:
        """Return the size of both outputs."""
        return sum(path.stat().st_size for path in (self._output, self._errors))

    def stop(self) -> None:
        """Send SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    async def end(self, timeout_s: float = END_TIMEOUT_S) -> dict[str, Any]:
        """Wait for its end; return `exit_code`, `integrity`, `tracebacks` and the `log`."""
        try:
            await asyncio.to_thread(self._process.wait, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        output, log = _tail(self._output), _tail(self._errors)
        lines = [line for line in output.splitlines() if line.startswith('{"integrity"')]
        integrity = (
            json.loads(lines[-1])["integrity"]
            if lines
            else "never checked: the process did not come to its end"
        )
        return {
            "exit_code": self._process.returncode,
            "integrity": integrity,
            "tracebacks": log.count("Traceback"),
            "log": log[-3000:],
        }

    def is_logged(self, text: str) -> bool:
        """Return whether a text is in its output."""
        return any(text in _tail(path) for path in (self._output, self._errors))


class ServerNotStartedError(RuntimeError):
    """The server ended before it was ready; the message is its log."""


def _tail(path: Path) -> str:
    """Return the last part of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _MAX_LOG_BYTES))
        return file.read().decode("utf-8", "replace")


def serve_and_check(arguments: Sequence[str]) -> int:
    """Run the command to its end, then check the engine's integrity.

    Arguments such as RLIMIT_NOFILE=64 limit this process; the others are the command's.
    """
    flags = [argument for argument in arguments if not _set_limit(argument)]
    loaded: list[Engine] = []
    load = Engine.load

    def remember(*arguments: Any, **settings: Any) -> Engine:
        loaded.append(load(*arguments, **settings))
        return loaded[-1]

    Engine.load = remember  # type: ignore[method-assign]
    code = main(["serve", *flags])
    try:
        for engine in loaded:
            engine.check_integrity()
            assert not engine.has_work, f"{engine.stats()} after the end"
            assert engine.blocks.num_used == 0, (
                f"{engine.blocks.num_used} blocks are held by nobody"
            )
        integrity = "clean" if loaded else "no engine was loaded"
    except AssertionError as error:
        integrity = f"broken: {error}"
    print(json.dumps({"integrity": integrity}), flush=True)
    return code


def _set_limit(argument: str) -> bool:
    """Apply a limit; return whether the argument is one."""
    match = _LIMIT.fullmatch(argument)
    if match is None:
        return False
    name, value = match.groups()
    import resource  # noqa: PLC0415 - POSIX only

    number = getattr(resource, name)
    resource.setrlimit(number, (int(value), resource.getrlimit(number)[1]))
    return True


if __name__ == "__main__":
    sys.exit(serve_and_check(sys.argv[1:]))
