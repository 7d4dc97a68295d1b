"""vLLM's CPU build with its own speculative decoding.

A variant is JSON: the type of the weights, the method of drafting, and the draft model's folder.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.vllm import open_llm
from benchmarks.worker import serve

_CACHE_GB = 1
_MODEL_TOKENS = 512
_DRAFTED_TOKENS = 5
_COUNTERS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load an LLM whose requests all draft, or none."""
    options = json.loads(variant)
    configs: dict[str, dict[str, Any]] = {
        "none": {},
        "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4},
        "draft": {"model": options["draft"]},
    }
    config = configs[options["method"]]
    llm = open_llm(
        model,
        options["type"],
        threads,
        cache_gb=_CACHE_GB,
        max_model_len=_MODEL_TOKENS,
        disable_log_stats=False,  # its counters of drafts are metrics
        speculative_config={**config, "num_speculative_tokens": _DRAFTED_TOKENS}
        if config
        else None,
    )
    import vllm  # noqa: PLC0415 - after its environment

    engine = llm.llm_engine

    def counters() -> list[int]:
        values = {metric.name: metric.value for metric in llm.get_metrics() if _is_counter(metric)}
        return [int(values.get(name, 0)) for name in _COUNTERS]

    def generate(
        prompts: list[list[int]], lengths: list[int], temperature: float, seed: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = vllm.SamplingParams(
                temperature=temperature, seed=seed, max_tokens=length, min_tokens=length,
                ignore_eos=True, detokenize=False,
            )  # fmt: skip
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        answers: list[list[int]] = [[] for _ in prompts]
        first_tokens, before, started_s = 0, [0, 0], 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            if not first_tokens and all(answers):
                first_tokens, before = sum(map(len, answers)), counters()
                started_s = time.perf_counter()
        seconds = time.perf_counter() - started_s
        drafted, accepted = (now - then for now, then in zip(counters(), before, strict=True))
        tokens = sum(map(len, answers)) - first_tokens
        return answers, {
            "seconds": seconds, "tokens": tokens, "drafted": drafted, "accepted": accepted,
        }  # fmt: skip

    return generate, {"versions": {"vllm": vllm.__version__}, **_limits()}


def _limits() -> dict[str, str]:
    """Return why drafts are of no use at temperatures above 0, if so.

    The CPU build 0.32 expands the temperatures of requests to their drafted tokens in a copy, which
    it discards: the scores of drafted tokens are divided by what was in memory.
    """
    import torch  # noqa: PLC0415 - comes with vllm
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens  # noqa: PLC0415 - as above

    temperatures = torch.tensor([0.5, 0.25])
    ends = torch.tensor([1, 3], dtype=torch.int32)
    if expand_batch_to_tokens(temperatures, ends, 3).tolist() == [0.5, 0.25, 0.25]:
        return {}
    return {"greedy_only": "its temperatures of drafted tokens are uninitialized memory"}


def _is_counter(metric: Any) -> bool:
    return metric.name in _COUNTERS


def preload_openmp() -> None:
    """Start this process again with Intel's OpenMP, which vLLM recommends for drafts."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if library.is_file() and "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        preloaded = [os.environ.get("LD_PRELOAD", ""), str(library)]
        os.environ["LD_PRELOAD"] = ":".join(filter(None, preloaded))
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])


if __name__ == "__main__":
    preload_openmp()
    serve(load)
