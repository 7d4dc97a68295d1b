"""nanovllm with its speculative decoding, without prefix caching.

A variant is JSON: the type of the weights, the method of drafting, the draft model's folder, and
further settings of the engine.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nanovllm
from benchmarks.contenders import OUR_OPTIONS
from benchmarks.speculation import MAX_BATCHED_TOKENS, run
from benchmarks.worker import serve
from nanovllm import SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load an engine whose requests all draft, or none."""
    options = json.loads(variant)
    configs = {"none": None, "ngram": {"method": "ngram"}, "draft": {"model": options["draft"]}}
    settings = {
        "num_threads": threads,
        "max_num_batched_tokens": MAX_BATCHED_TOKENS,
        "speculative_config": configs[options["method"]],
        **OUR_OPTIONS[options["type"]],
        **options["ours"],
        "enable_prefix_caching": False,
    }
    engine = Engine.load(model, EngineConfig(**settings))

    def generate(
        prompts: list[list[int]], lengths: list[int], temperature: float, seed: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        params = SamplingParams(
            max_tokens=max(lengths), temperature=temperature, seed=seed, ignore_eos=True
        )
        turn, outputs = run(engine, prompts, params)
        return [token_ids for token_ids, _ in outputs], asdict(turn)

    return generate, {"versions": {"nanovllm": nanovllm.__version__}}


if __name__ == "__main__":
    serve(load)
