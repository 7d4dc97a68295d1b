"""nanovllm with its speculative decoding, without prefix caching.

A variant is JSON: the type of the weights, the method of drafting, the draft model's folder, and
further settings of the engine.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nanovllm
from benchmarks.speculation import load_pair, run
from benchmarks.speculation_work import Pair
from benchmarks.worker import serve
from nanovllm import SamplingParams


def load(model: Path, variant: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """Load an engine whose requests all draft, or none."""
    options = json.loads(variant)
    pair = Pair(model, Path(options["draft"]))
    engine = load_pair(pair, options["type"], options["method"], threads, options["ours"])

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
