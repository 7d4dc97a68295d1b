"""`nanovllm bench threads`: speed by the number of threads, beside the bandwidth of the memory.

The model is loaded again for each number, as by --num-threads, so the numbers share no memory. How
many of its threads an engine uses adapts as in a server. The bandwidth is that of as many threads,
read after their run from an array that one thread has written, like the weights.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from nanovllm.cli.bench.offline import (
    Bench,
    about_engine,
    lengths_of,
    random_jobs,
    read_options,
    record_engine,
)
from nanovllm.cli.bench.options import ThreadsOptions
from nanovllm.cli.bench.report import publish, shown
from nanovllm.cli.bench.roofline import Costs
from nanovllm.errors import counted
from nanovllm.model.machine import usable_cpus

_LENGTHS = (128, 32)
_AS_GOOD = 0.98  # of the best speed; smaller differences are noise
SPEEDS = ("decode_1_tokens_per_s", "decode_batch_tokens_per_s", "prefill_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured with a number of threads; the bytes are what a single sequence reads."""

    threads: int
    decode_1_tokens_per_s: float
    decode_batch_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_1_bytes_per_s: float
    memory_bytes_per_s: float


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`, and `most` itself."""
    counts = {base << power for base in (1, 3) for power in range(most.bit_length())}
    return sorted({most, *(count for count in counts if count < most)})


def best_threads(rows: Sequence[Row]) -> dict[str, int]:
    """Return the fewest threads within 2% of the best speed: of each speed, and of all together.

    Together counts the geometric mean of the speeds.
    """
    speeds = {name: [getattr(row, name) for row in rows] for name in SPEEDS}
    speeds["all"] = [math.prod(each) for each in zip(*speeds.values(), strict=True)]
    floors = {name: _AS_GOOD * max(values) for name, values in speeds.items()}
    floors["all"] = _AS_GOOD ** len(SPEEDS) * max(speeds["all"])
    return {
        name: next(
            row.threads for row, speed in zip(rows, values, strict=True) if speed >= floors[name]
        )
        for name, values in speeds.items()
    }


def run_threads(parsed: argparse.Namespace) -> int:
    """Measure each number of threads in turn."""
    config, options = read_options(parsed, ThreadsOptions)
    lengths = lengths_of(options, config, _LENGTHS)
    rows: list[Row] = []
    about: dict[str, str] = {}
    settings: dict[str, Any] = {}
    counts = thread_counts(options.max_threads or usable_cpus())
    for threads in tqdm(counts, desc="Numbers of threads", unit="number", disable=None):
        bench = Bench.load(options.model, replace(config, num_threads=threads), temperature=0.0)
        rows.append(_measure(bench, options, lengths, threads))
        about, settings = about_engine(options.model, bench), record_engine(options.model, bench)
        bench.engine.close()
        del bench  # before the next one is loaded
    del settings["settings"]["num_threads"]  # the last one of several
    best = best_threads(rows)
    input_len, output_len = lengths
    about |= {
        "work": f"1 and {counted(options.batch_size, 'sequence')}, each "
        f"{counted(input_len, 'token')} in and {output_len} out, {options.num_iters} times",
        "best": f"{counted(best['all'], 'thread')}; for 1 sequence {best[SPEEDS[0]]}, for "
        f"{options.batch_size} {best[SPEEDS[1]]}, for prefill {best[SPEEDS[2]]}",
    }
    record = {
        "benchmark": "threads", "batch_size": options.batch_size, "input_len": input_len,
        "output_len": output_len, "num_iters": options.num_iters, "best_threads": best,
        "threads": [asdict(row) for row in rows], **settings,
    }  # fmt: skip
    publish(about, _table(rows, options.batch_size), record, options.json)
    return 0


def _measure(bench: Bench, options: ThreadsOptions, lengths: tuple[int, int], threads: int) -> Row:
    from nanovllm.cli.bench.machine import measure_bandwidth  # slow to import

    engine = bench.engine
    engine.warm_up()
    phases = []
    for batch_size in (1, options.batch_size):
        jobs = random_jobs(engine, batch_size, *lengths)
        measured = Bench(engine, bench.temperature)
        for _ in range(options.num_iters):
            measured.run(jobs)
        phases.append(measured.phases)
    alone, batch = phases
    costs, decode = Costs.of_engine(engine), alone.decode
    return Row(
        threads,
        alone.decode.tokens / alone.decode.seconds,
        batch.decode.tokens / batch.decode.seconds,
        batch.prefill.tokens / batch.prefill.seconds,
        costs.read_bytes(decode.steps, decode.keys) / decode.seconds,
        measure_bandwidth(threads),
    )


def _table(rows: Sequence[Row], batch_size: int) -> dict[str, str]:
    """Return a line of figures for each number of threads, after the columns' names and units."""
    columns: dict[str, tuple[str, ...]] = {
        "threads": ("decode 1", f"decode {batch_size}", "prefill", "decode 1", "memory"),
        "": ("tok/s", "tok/s", "tok/s", "GB/s read", "GB/s"),
    }
    for row in rows:
        speeds = (row.decode_1_tokens_per_s, row.decode_batch_tokens_per_s)
        columns[f"{row.threads}"] = (
            *(shown(speed, digits=1) for speed in (*speeds, row.prefill_tokens_per_s)),
            *(
                shown(rate / 1e9, digits=1)
                for rate in (row.decode_1_bytes_per_s, row.memory_bytes_per_s)
            ),
        )
    return {label: "".join(f"{value:>12}" for value in values) for label, values in columns.items()}
