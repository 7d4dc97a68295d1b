"""`nanovllm serve` in a process of its own, for benchmarks: the very command, and at its end a look into the books of its engine.

Run as a program it is the command, which remembers the engine that it loads. When a signal has ended the command, and the engine's thread with
it, the engine checks its integrity in this process and one line of JSON tells the result. So nothing of it can be reached from outside.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm.cli.main import main
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine

START_TIMEOUT_S = 300.0  # where the kernels were never compiled before
END_TIMEOUT_S = 60.0
_ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A server as a context manager: `port` and `pid` while it runs, `end()` for how it ended."""

    def __init__(self, flags: Sequence[str]) -> None:
        """Start on entering, on a free port; standard error goes to a file, which `end` reads."""
        self._flags = flags
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed on leaving
        self._process: subprocess.Popen[str]
        self.port = 0

    def __enter__(self) -> "ServerProcess":
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *self._flags, "--port", "0"],
            stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        timer = threading.Timer(START_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if found := re.match(r"Serving on http://[^ ]*:(\d+) ", line):
                    self.port = int(found[1])
                    return self
        finally:
            timer.cancel()
        raise RuntimeError(f"the server did not start: {self._read_errors()[-3000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def stop(self) -> None:
        """Send the signal that asks it to end."""
        self._process.send_signal(signal.SIGTERM)

    async def end(self) -> dict[str, Any]:
        """Wait for its end: `exit_code`, `integrity` ("clean" or what is wrong), `tracebacks` in its log, and the log's tail."""
        try:
            output, _ = await asyncio.to_thread(self._process.communicate, timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, _ = self._process.communicate()
        lines = [line for line in output.splitlines() if line.startswith('{"integrity"')]
        log = self._read_errors()
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

    def _read_errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


def serve_and_check(flags: Sequence[str]) -> int:
    """Run the command to its end, then check what its engine has left."""
    loaded: list[Engine] = []
    load = Engine.load

    def remember(folder: Path, config: EngineConfig | None = None) -> Engine:
        loaded.append(load(folder, config))
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


if __name__ == "__main__":
    sys.exit(serve_and_check(sys.argv[1:]))
