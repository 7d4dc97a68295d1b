"""nanovllm: LLM.generate with scheduler, sampler and detokenizer, without prefix caching.

A variant is JSON for LLM.
"""

import json
from pathlib import Path
from typing import Any

import nanovllm
from benchmarks.worker import serve
from nanovllm import LLM, SamplingParams


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load an LLM; with `is_checked` a run also returns the gaps of the top two tokens."""
    llm = LLM(
        model,
        num_threads=threads,
        **{"backend": "numba", "enable_prefix_caching": False, **json.loads(variant)},
    )

    def generate(
        prompts: list[list[int]], lengths: list[int], is_checked: bool = False
    ) -> tuple[list[list[int]], dict[str, Any]]:
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=length,
                ignore_eos=True,
                logprobs=2 if is_checked else None,
            )
            for length in lengths
        ]
        outputs = llm.generate(list(prompts), params, use_tqdm=False)
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(errors[0])
        answers = [output.outputs[0] for output in outputs]
        details: dict[str, Any] = {
            "cached_tokens": sum(output.num_cached_tokens for output in outputs)
        }
        if is_checked:
            best = [
                [
                    sorted((word.logprob for word in place.values()), reverse=True)
                    for place in answer.logprobs or []
                ]
                for answer in answers
            ]
            details["gaps"] = [[first - second for first, second, *_ in places] for places in best]
        return [answer.token_ids for answer in answers], details

    block_size = llm.engine.config.block_size
    pair_bytes = llm.engine.runner.backend.block_bytes(block_size) / block_size
    return generate, {"versions": {"nanovllm": nanovllm.__version__}, "pair_bytes": pair_bytes}


if __name__ == "__main__":
    serve(load)
