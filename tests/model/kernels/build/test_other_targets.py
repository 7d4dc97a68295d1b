"""Kernels that are compiled by name for older CPUs than this one."""

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.config import BackendName
from nanovllm.model.kernels.build.target import host_target
from tests.support.targets import OLDER, load_whole, set_cpu_name

PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.mark.slow(20)
@pytest.mark.skipif(not OLDER, reason="no older x86 CPU")
def test_older_processors_generate_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def token_ids(backend: BackendName) -> list[int]:
        llm = LLM(backend=backend, kv_cache_memory="4MiB")
        return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    expected = token_ids("numpy")
    for name, target in OLDER.items():
        load_whole(target)
        set_cpu_name(monkeypatch, name)
        assert host_target() == target
        assert token_ids("numba") == expected
