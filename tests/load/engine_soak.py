"""Run serve32 in a loop: do memory and speed stay flat?

Run: python -m tests.load.engine_soak --minutes 30

Each minute it reports tokens per second, resident memory and memory bandwidth: speed that falls
with the bandwidth is the machine's. The verdict compares the last quarter of the minutes with the
first, without the first minute; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import CLASSES, OUR_OPTIONS
from benchmarks.options import MODEL, ensure_model, finish, in_process, new_parser
from benchmarks.peers.ours import load
from benchmarks.worker import resident_bytes
from benchmarks.workload import make_workloads
from nanovllm.cli.argument_types import positive_number
from nanovllm.cli.bench.machine import MemoryReader

MEMORY_GROWTH_BYTES = 8 << 20
SPEED_LOSS = 0.1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, *MODEL)
    parser.add_argument(
        "--type", choices=CLASSES, default="float32", help="type of the weights (%(default)s)"
    )
    parser.add_argument(
        "--minutes", type=positive_number, default=30.0, help="how long (%(default)s)"
    )
    parser.add_argument(
        "--interval-s", type=positive_number, default=60.0, help="how often to tell (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, report and judge; return 1 if memory grew or speed fell."""
    parsed = parse(arguments)
    model = ensure_model(parsed.model)
    work = make_workloads(model.vocab, parsed.seed, parsed.scale)["serve32"]
    generate, _ = load(
        parsed.model, json.dumps({**OUR_OPTIONS[parsed.type], **parsed.ours}), parsed.threads
    )
    run = in_process(generate)
    reader = MemoryReader(parsed.threads)
    expected = run(work.prompts, work.lengths)["token_ids"]
    intervals: list[dict[str, Any]] = []
    end_s = time.monotonic() + 60 * parsed.minutes
    while time.monotonic() < end_s:
        tokens, busy_s, stop_s = 0, 0.0, min(time.monotonic() + parsed.interval_s, end_s)
        while time.monotonic() < stop_s:
            answer = run(work.prompts, work.lengths)
            assert answer["token_ids"] == expected, "the same requests were answered otherwise"
            tokens, busy_s = tokens + work.tokens, busy_s + answer["seconds"]
        if tokens:
            intervals.append(
                {
                    "tokens_per_s": tokens / busy_s,
                    "rss_bytes": resident_bytes(),
                    "bandwidth_bytes_per_s": reader.bytes_per_s(),
                }
            )
            print(shown(len(intervals), intervals[-1]), flush=True)
    reader.close()
    verdict = judge(intervals)
    print(f"\n{verdict['text']}\n")
    finish(
        {
            "benchmark": "soak",
            "type": parsed.type,
            "minutes": parsed.minutes,
            "intervals": intervals,
            **verdict,
        },
        parsed,
    )
    return int(not verdict["is_flat"])


def judge(intervals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the growth of memory in bytes, and the relative loss of speed."""
    later = intervals[1:] if len(intervals) > 4 else intervals
    part = max(1, len(later) // 4)
    first, last = later[:part], later[-part:]

    def change(name: str) -> tuple[float, float]:
        return statistics.median(item[name] for item in first), statistics.median(
            item[name] for item in last
        )

    before, after = change("tokens_per_s")
    loss = 1 - after / before
    growth = (
        None
        if any(item["rss_bytes"] is None for item in later)
        else change("rss_bytes")[1] - change("rss_bytes")[0]
    )
    is_flat = loss <= SPEED_LOSS and (growth is None or growth <= MEMORY_GROWTH_BYTES)
    memory = (
        "memory is unknown here"
        if growth is None
        else f"memory changed by {growth / 2**20:+.1f} MiB"
    )
    text = (
        f"{'Flat' if is_flat else 'NOT flat'}: {memory}, speed by {-loss:+.1%} "
        f"({before:,.0f} to {after:,.0f} tok/s)"
    )
    return {"is_flat": is_flat, "memory_growth_bytes": growth, "speed_loss": loss, "text": text}


def shown(number: int, interval: dict[str, Any]) -> str:
    """Format one interval."""
    rss = interval["rss_bytes"]
    memory = "-" if rss is None else f"{rss / 2**20:,.1f} MiB"
    bandwidth = f"memory at {interval['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    return f"{number:4}  {interval['tokens_per_s']:8,.1f} tok/s  {memory:>13}  {bandwidth}"


if __name__ == "__main__":
    sys.exit(main())
