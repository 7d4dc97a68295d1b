"""Measure the fraction of the machine's limits: decode of bandwidth, prefill of peak FLOPS.

Run: python benchmarks/roofline.py --classes float32,bfloat16,int8 --pairs 12

Measurements of the limits and runs take turns in one process with the same threads, because the
bandwidth of a shared machine drifts within seconds. Each run is compared with the mean of the
measurements before and after it. The report has median and spread; the last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OUR_OPTIONS
from benchmarks.options import (
    MODEL,
    ensure_model,
    finish,
    in_process,
    new_parser,
    spread,
)
from benchmarks.peers.ours import load
from benchmarks.workload import Workload, make_workloads
from nanovllm.cli.argument_types import positive
from nanovllm.cli.bench.machine import MemoryReader, measure_peak
from nanovllm.cli.bench.roofline import Costs
from nanovllm.model.config import ModelConfig

_READINGS = 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, *MODEL, "classes")
    parser.add_argument(
        "--pairs", type=positive, default=12, help="readings and runs of each kind (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    model = ensure_model(parsed.model)
    workloads = make_workloads(model.vocab, parsed.seed, parsed.scale)
    found = {kind: measure_class(kind, model, workloads, parsed) for kind in parsed.classes}
    finish({"benchmark": "roofline", "pairs": parsed.pairs, "classes": found}, parsed)
    return 0


def measure_class(
    kind: str, model: ModelConfig, workloads: dict[str, Workload], parsed: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure decode1 and prefill512 of a class beside the machine's limits."""
    generate, about = load(
        parsed.model, json.dumps({**OUR_OPTIONS[kind], **parsed.ours}), parsed.threads
    )
    costs = Costs.of(model, kind, about["pair_bytes"])
    decode, prefill = workloads["decode1"], workloads["prefill512"]
    context = len(decode.prompts[0])
    seen = sum(context + step for step in range(1, decode.tokens + 1))
    operations = costs.operations(prefill.tokens, prefill.tokens * (prefill.tokens + 1) // 2, 1)
    reader = MemoryReader(parsed.threads)
    try:
        found = {
            "decode1": _pairs(
                generate,
                decode,
                costs.read_bytes(decode.tokens, seen),
                lambda: reader.bytes_per_s(_READINGS),
                parsed.pairs,
            )
        }
    finally:
        reader.close()
    if measure_peak(kind, parsed.threads) is not None:
        found["prefill512"] = _pairs(
            generate,
            prefill,
            operations,
            lambda: measure_peak(kind, parsed.threads) or 0.0,
            parsed.pairs,
        )
    return found


def _pairs(
    generate: Callable[..., Any],
    workload: Workload,
    amount: float,
    read_limit: Callable[[], float],
    count: int,
) -> dict[str, Any]:
    """Run `count` times between measurements of the limit; `amount` is bytes or operations."""
    timed = in_process(generate)
    workload.run(timed)
    before, limits, shares, speeds = read_limit(), [], [], []
    for _ in range(count):
        seconds, _ = workload.run(timed)
        after = read_limit()
        limits.append((before + after) / 2)
        shares.append(amount / seconds / limits[-1])
        speeds.append(workload.tokens / seconds)
        before = after
    return {"share": spread(shares), "tokens_per_s": spread(speeds), "limit_per_s": spread(limits)}


if __name__ == "__main__":
    sys.exit(main())
