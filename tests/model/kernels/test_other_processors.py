"""The kernels for processors with less than this one has: compiled for them by name, from nothing, in a process of their own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams

PROMPT, TOKENS = "Once upon a time", 16
PROGRAM = f"""
from nanovllm import LLM, SamplingParams
from nanovllm.model.kernels.target import host_target
llm = LLM(backend="numba", kv_cache_memory="4MiB")
answer = llm.generate({PROMPT!r}, SamplingParams(temperature=0, max_tokens={TOKENS}), use_tqdm=False)[0].outputs[0]
print(host_target().lanes, *answer.token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine().lower() not in {"x86_64", "amd64"},
    reason="the names are those of x86 processors",
)
@pytest.mark.parametrize(("processor", "lanes"), [("haswell", 8), ("x86-64", 4)])
def test_an_older_processor_generates_the_same_text(
    tmp_path: Path, processor: str, lanes: int
) -> None:
    kept = {
        name: value for name, value in os.environ.items() if name != "NUMBA_CPU_FEATURES"
    }  # it would go before the name
    environment = {**kept, "NUMBA_CPU_NAME": processor, "NANOVLLM_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, *token_ids = map(int, done.stdout.split())
    assert found == lanes
    expected = LLM(backend="numpy", kv_cache_memory="4MiB").generate(
        PROMPT, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False
    )
    assert token_ids == expected[0].outputs[0].token_ids
