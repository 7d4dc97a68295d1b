"""GuideLLM's benchmark of completions and chats."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import FOLDER, KEY, MODEL, OFFLINE, URL, works


def benchmark(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        ran = subprocess.run(
            [
                str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console",
                "--backend",
                (
                    f"kind=openai_http,target={URL},model={MODEL},"
                    f"api_key={KEY},request_format={path}"
                ),
                "--tokenizer", f"kind=huggingface_auto,model={FOLDER}",
                "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
                "--profile", "kind=concurrent,streams=4",
                "--constraint", "kind=max_requests,count=20",
                "--output", f"kind=json,path={report}",
            ],
            env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, (ran.stdout + ran.stderr)[-1800:]
        (run,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = run["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (20, 0), totals


@works
def completions() -> None:
    benchmark("/v1/completions")


@works
def chats() -> None:
    benchmark("/v1/chat/completions")
