"""A contender's process: load a model, then answer lines of JSON.

    out   {"ready": {...}}, or {"missing": reason} without its package, or {"failed": reason}
    in    {"prompts": [[1, 2, 3], ...], "lengths": [4, ...], ...}
    out   {"seconds": 0.5, "token_ids": [[...], ...], ...}

This file needs the standard library alone.

Run one by hand: python -m benchmarks.peers.llamacpp MODEL f32 --threads 2
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
"""generate(prompts, lengths) returns token ids, or (token ids, details).

It may take further keywords of the request.
"""
Load = Callable[[Path, str, int], tuple[Callable[..., Any], dict[str, Any]]]
"""load(model, variant, threads) returns a Generate, and details such as versions."""
Answer = Callable[..., dict[str, Any]]
"""answer(**request) returns the answer as JSON values."""


def serve(load: Load) -> None:
    """Run the worker of the command line until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("variant")
    parser.add_argument("--threads", type=int, required=True)
    parsed = parser.parse_args()

    def start() -> tuple[Answer, dict[str, Any]]:
        generate, about = load(parsed.model, parsed.variant, parsed.threads)
        return lambda **request: _generate(generate, request), about

    serve_requests(start, parsed.threads)


def serve_requests(start: Callable[[], tuple[Answer, dict[str, Any]]], threads: int) -> None:
    """Load what `start` loads, then answer requests until the input ends.

    `start` returns a function that answers a request, and details such as versions.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # What libraries print must not come between the lines of JSON.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    try:
        answer, about = start()
    except ModuleNotFoundError as error:
        tell({"missing": str(error)})
        return
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the others go on
        tell({"failed": f"{type(error).__name__}: {error}"[:2000]})
        return
    tell({"ready": about})
    for line in sys.stdin:
        try:
            tell(answer(**json.loads(line)))
        except Exception as error:  # noqa: BLE001 - as above
            tell({"failed": f"{type(error).__name__}: {error}"[:2000]})


def _generate(generate: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    started_s = time.perf_counter()
    answer = generate(**request)
    seconds = time.perf_counter() - started_s
    token_ids, details = answer if isinstance(answer, tuple) else (answer, {})
    return {"seconds": seconds, "token_ids": token_ids, **details}


def peak_bytes() -> int | None:
    """Return the maximum resident memory of this process; None where the system has no record."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def resident_bytes(pid: int | None = None) -> int | None:
    """Return a process's resident memory, by default this one's; None if unknown."""
    pid = os.getpid() if pid is None else pid
    statm = Path(f"/proc/{pid}/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
        )
        return int(asked.stdout) * 1024
    return None


def in_groups(
    prompts: list[list[int]], lengths: list[int], size: int
) -> list[tuple[list[list[int]], list[int]]]:
    """Split the requests into static batches, for peers without continuous batching."""
    return [
        (prompts[start : start + size], lengths[start : start + size])
        for start in range(0, len(prompts), size)
    ]
