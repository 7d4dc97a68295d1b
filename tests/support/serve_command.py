"""`nanovllm serve` as a process, for tests."""

import contextlib
import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0  # where the kernels were never compiled before


class Serving:
    """A `nanovllm serve` process, as a context manager; `startup_lines` is its first output.

    With --log-requests that is standard error, otherwise standard output.
    """

    def __init__(self, *flags: str, variables: Mapping[str, str] | None = None) -> None:
        self._logs_requests = "--log-requests" in flags
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("NANOVLLM_API_KEY", "PYTHONPATH")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.cli.main", "serve", *flags, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, **(variables or {})},
        )  # fmt: skip
        self.startup_lines: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_output),
            threading.Thread(target=self._read_errors),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> "Serving":
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not any(line.startswith("  curl ") for line in self.startup_lines):
            assert self.process.poll() is None, "".join(self._errors)
            assert time.monotonic() < deadline_s
            with contextlib.suppress(queue.Empty):
                self.startup_lines.append(self._lines.get(timeout=0.1))
            if self._logs_requests:
                self.startup_lines = [*self._errors]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.wait()

    @property
    def port(self) -> int:
        """Return the port that it printed."""
        line = next(line for line in self.startup_lines if line.startswith("Serving on "))
        return int(line.split(" - ")[0].rsplit(":", 1)[1])

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Return status and JSON of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        content = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST",
            path,
            content,
            {"Content-Type": "application/json", **headers},
        )
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        return response.status, json.loads(answer)

    def read_stream(self, begun: threading.Event, body: Mapping[str, Any], **headers: str) -> bytes:
        """Return a streamed completion as it came; `begun` is set after its first line."""
        content = {"prompt": "Once upon a time", "stream": True, "ignore_eos": True, **body}
        headers = {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        with closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(content), headers)
            with closing(connection.getresponse()) as response:
                received = response.readline()
                begun.set()
                return received + response.read()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit code and standard error."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Return the exit code and standard error."""
        code = self.process.wait(TIMEOUT_S)
        for reader in self._readers:
            reader.join(TIMEOUT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code, "".join(self._errors)

    @property
    def errors(self) -> str:
        """Return standard error so far."""
        return "".join(self._errors)

    def printed(self) -> str:
        """Return the unread rest of standard output, after it has ended."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return "".join(lines)

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors += self.process.stderr
