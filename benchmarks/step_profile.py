"""Profile steps as `nanovllm bench profile` does, for several types of weights in one report.

Run: python benchmarks/step_profile.py --classes float32,int8 --steps 1,8,32,p512

A step decodes so many sequences with --context tokens each, or computes a prompt (p512). The last
line of the report is JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OUR_OPTIONS
from benchmarks.options import ensure_model, finish, new_parser
from nanovllm.cli.argument_types import positive
from nanovllm.cli.bench.offline import Bench
from nanovllm.cli.bench.profile import figures_of, profile
from nanovllm.cli.bench.roofline import Limits
from nanovllm.config import EngineConfig


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "model", "classes", "rounds", rounds=9)
    parser.add_argument(
        "--steps", type=_steps, default=_steps("1,8,32,p512"), help="steps (1,8,32,p512)"
    )
    parser.add_argument(
        "--context", type=positive, default=144, help="tokens of a sequence (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    ensure_model(parsed.model)
    largest = max(512, *(int(name.lstrip("p")) for name in parsed.steps))
    results = []
    for kind in parsed.classes:
        config = EngineConfig(
            **OUR_OPTIONS[kind], num_threads=parsed.threads, seed=parsed.seed,
            max_num_seqs=largest, max_num_batched_tokens=largest, enable_prefix_caching=False,
        )  # fmt: skip
        bench = Bench.load(str(parsed.model), config, temperature=0.0)
        limits = Limits.measure(bench.engine)
        for name in parsed.steps:
            is_prefill, count = name.startswith("p"), int(name.lstrip("p"))
            batch_size, input_len = (1, count) if is_prefill else (count, parsed.context)
            steps = profile(bench, batch_size, input_len, parsed.rounds, is_prefill=is_prefill)
            figures = figures_of(bench, steps, limits)
            results.append({"type": kind, "step": name, "limits": asdict(limits), **figures})
        bench.engine.close()
    finish({"benchmark": "step_profile", "results": results}, parsed)
    return 0


def _steps(text: str) -> list[str]:
    """Parse numbers of sequences, and prompts as p and their tokens, with commas between them."""
    names = text.split(",")
    for name in names:
        positive(name.removeprefix("p"))
    return names


if __name__ == "__main__":
    sys.exit(main())
