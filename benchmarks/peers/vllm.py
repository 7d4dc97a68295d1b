"""vLLM's CPU build, offline, prefix caching off, without detokenizing. A variant is a dtype."""

import os
from pathlib import Path
from typing import Any

from benchmarks.worker import serve

_CACHE_GB = 4


def open_llm(model: Path, dtype: str, threads: int, *, cache_gb: int, **more: Any) -> Any:
    """Load an LLM in this process; `more` are its further options."""
    usable = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(threads))
    )
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(cache_gb),
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, usable[:threads])),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    import vllm  # noqa: PLC0415 - reads the environment, and tells that it is missing

    return vllm.LLM(str(model), dtype=dtype, enable_prefix_caching=False, max_num_seqs=32, **more)


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load an LLM without drafts."""
    llm = open_llm(
        model, variant, threads, cache_gb=_CACHE_GB, max_model_len=1024, disable_log_stats=True
    )
    import vllm  # noqa: PLC0415 - after its environment

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            vllm.SamplingParams(
                temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False
            )
            for n in lengths
        ]
        return [
            list(output.outputs[0].token_ids)
            for output in llm.generate(asked, params, use_tqdm=False)
        ]

    return generate, {"versions": {"vllm": vllm.__version__}}


if __name__ == "__main__":
    serve(load)
