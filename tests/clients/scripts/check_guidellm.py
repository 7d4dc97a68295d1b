"""GuideLLM's benchmark of completions and chats."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import FOLDER, KEY, MODEL, OFFLINE, URL, works


def benchmark(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        ran = subprocess.run(
            [
                str(Path(sys.executable).parent / "guidellm"), "benchmark", "run", "--target", URL, "--model", MODEL,
                "--processor", FOLDER, "--data", "prompt_tokens=32,output_tokens=8", "--request-type", kind,
                "--profile", "concurrent", "--rate", "4", "--max-requests", "20", "--outputs", str(report),
                "--backend-kwargs", json.dumps({"api_key": KEY}), "--disable-console",
            ],
            env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, (ran.stdout + ran.stderr)[-1800:]
        (run,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (20, 0), totals


@works
def completions() -> None:
    benchmark("text_completions")


@works
def chats() -> None:
    benchmark("chat_completions")
