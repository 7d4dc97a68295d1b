"""Contenders and their processes.

All but one are stopped (SIGSTOP), so that none spins or wakes while another is timed.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.workload import Answer

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("float32", "bfloat16", "int8")
OURS = "nanovllm"

PEERS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "llamacpp": {"float32": ["f32"], "bfloat16": ["bf16"], "int8": ["q8_0"]},
    "openvino": {
        "float32": ["fp32:f32"],
        "bfloat16": ["fp32:bf16"],
        "int8": ["int8:f32", "int8:bf16"],
    },
    "vllm": {"float32": ["float32"], "bfloat16": ["bfloat16"]},
    "ctranslate2": {"float32": ["float32"], "int8": ["int8"]},
    "transformers": {"float32": ["float32"], "bfloat16": ["bfloat16"]},
}
"""{peer: {class: variants}}; the peers' modules in benchmarks/peers explain their variants."""

OUR_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}

_ENDED: dict[str, Any] = {"ended": True}


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender: a module of benchmarks/peers, a variant, and a Python with its package."""

    name: str
    module: str
    variant: str
    python: str


def entries(
    kind: str, peers: Sequence[str], pythons: Mapping[str, str], our_options: Mapping[str, Any]
) -> list[Entry]:
    """Return ours and the peers' variants of a class; `pythons` has each one's interpreter."""
    ours = Entry(OURS, "ours", json.dumps({**OUR_OPTIONS[kind], **our_options}), pythons[OURS])
    theirs = [
        Entry(f"{peer} {variant}", peer, variant, pythons[peer])
        for peer in peers
        for variant in PEERS[peer].get(kind, ())
    ]
    return [ours, *theirs]


class WorkerError(Exception):
    """A contender that does not answer, or has failed."""


@dataclass(slots=True)
class Contender:
    """A worker process, stopped except while it runs; `about` describes its software."""

    entry: Entry
    process: "subprocess.Popen[str]"
    log: IO[str]
    lines: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)
    about: dict[str, Any] = field(default_factory=dict)
    listener: threading.Thread = field(init=False)

    @classmethod
    def start(cls, entry: Entry, model: Path | str, threads: int, timeout_s: float) -> "Contender":
        """Start the worker and wait until its model is loaded; raises WorkerError.

        `model` is a checkpoint's folder, or the name of a setting of benchmarks/training_worker.py.
        """
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [
            entry.python,
            "-m",
            f"benchmarks.peers.{entry.module}",
            str(model.resolve() if isinstance(model, Path) else model),
            entry.variant,
            "--threads",
            str(threads),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            log.close()
            raise WorkerError(f"{entry.python} cannot be run: {error}") from error
        contender = cls(entry, process, log)
        contender.listener = threading.Thread(target=contender._listen, daemon=True)
        contender.listener.start()
        try:
            ready = contender._receive(timeout_s)
            if "missing" in ready:
                raise WorkerError(f"not installed: {ready['missing']}")
        except WorkerError:
            contender.close()
            raise
        contender.about = ready["ready"]
        contender._signal("SIGSTOP")
        return contender

    def ask(
        self, prompts: list[list[int]], lengths: list[int], timeout_s: float, **more: Any
    ) -> Answer:
        """Run a workload and stop the worker again; raises WorkerError, also for missing tokens."""
        answer = self.request(timeout_s, prompts=prompts, lengths=lengths, **more)
        counts = [len(tokens) for tokens in answer["token_ids"]]
        if counts != lengths:
            raise WorkerError(f"it did other work: {counts} tokens instead of {lengths}")
        if answer.get("cached_tokens", 0) != 0:
            raise WorkerError(
                f"{answer['cached_tokens']} tokens came from a cache, but all must be computed"
            )
        return answer

    def request(self, timeout_s: float, **message: Any) -> dict[str, Any]:
        """Send a request, return its answer and stop the worker again; raises WorkerError."""
        assert self.process.stdin is not None
        self._signal("SIGCONT")
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            return self._receive(timeout_s)
        except OSError as error:
            raise WorkerError(f"it ended: {self._last_log_line()}") from error
        finally:
            self._signal("SIGSTOP")

    def close(self) -> None:
        """Kill the worker."""
        self._signal("SIGCONT")
        self.process.kill()
        self.process.wait()
        self.listener.join()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # closing flushes what the worker did not read
            self.process.stdin.close()
        self.log.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(json.loads(line))
        self.lines.put(_ENDED)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            message = self.lines.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerError(f"no answer within {timeout_s:g} s") from None
        if message is _ENDED:
            raise WorkerError(f"it ended: {self._last_log_line()}")
        if "failed" in message:
            raise WorkerError(message["failed"])
        return message

    def _last_log_line(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1][:500] if lines else "without a message"

    def _signal(self, name: str) -> None:
        """Send a signal that stops or continues the process, if it exists."""
        if hasattr(signal, name) and self.process.poll() is None:
            self.process.send_signal(getattr(signal, name))
