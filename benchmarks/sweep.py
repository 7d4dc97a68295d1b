"""Measure how cost grows with batch, context, model and threads.

Run: python benchmarks/sweep.py --json sweep.json; then python benchmarks/plot.py sweep.json

Each point prefills a batch of about equal contexts and decodes some steps. It has the median step,
the prefill speed, the memory bandwidth before and after, and the minimum bytes and operations of a
step. The last line is JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import CLASSES, OUR_OPTIONS
from benchmarks.options import add_common_options, ensure_model, finish, heading, names_of, tell
from nanovllm import LLM, SamplingParams
from nanovllm.cli.bench.machine import KINDS, MemoryReader, measure_peak
from nanovllm.cli.bench.roofline import Costs, Phase, engine_costs
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import EngineFaultError

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (16, 32, 64, 128, 256, 512, 1024)
SIZES = ("gpt2", "gpt2-medium", "gpt2-large")
_USUAL_CONTEXT = 128
_USUAL_BATCH = (
    8  # for contexts: enough of them that the cache is a part of the cost, few enough to fit
)
_STEPS = 16
_READINGS = 2


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: its sweep and its position there."""

    sweep: str
    at: int | str
    batch: int
    context: int


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    parser.add_argument(
        "--classes",
        type=names_of(CLASSES),
        default=",".join(CLASSES),
        help="types of the weights (%(default)s)",
    )
    sweeps = ("batch", "context", "model", "threads")
    parser.add_argument(
        "--sweeps",
        type=names_of(sweeps),
        default=",".join(sweeps),
        help="what to vary (%(default)s)",
    )
    parser.add_argument(
        "--sizes",
        type=names_of(SIZES),
        default=",".join(SIZES),
        help="models, made beside --model where missing (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all points and report."""
    parsed = parse(arguments)
    ensure_model(parsed.model)
    print(heading(parsed), flush=True)
    points: list[dict[str, Any]] = []
    for kind in parsed.classes:
        for record in sweep_class(kind, parsed):
            points.append(record)
            print(shown(record), flush=True)
    limits = {str(threads): machine_limits(threads) for threads in sorted({1, parsed.threads})}
    finish({"benchmark": "sweep", "steps": _STEPS, "limits": limits, "points": points}, parsed)
    return 0


def sweep_class(kind: str, parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Return all points of a class, by model, because loading is slow."""
    longest = max(1, 1024 // parsed.scale)
    own: list[Point] = []
    if "batch" in parsed.sweeps:
        own += [
            Point("batch", batch, batch, max(1, _USUAL_CONTEXT // parsed.scale))
            for batch in BATCHES
            if batch <= max(1, 64 // parsed.scale)
        ]
    if "context" in parsed.sweeps:
        own += [
            Point("context", context, _USUAL_BATCH, context)
            for context in CONTEXTS
            if context <= longest
        ]
    here = Point("threads", parsed.threads, 1, max(1, _USUAL_CONTEXT // parsed.scale))
    if "threads" in parsed.sweeps:
        own.append(here)
    yield from measure(parsed.model, kind, parsed.threads, own, parsed)
    if "threads" in parsed.sweeps:
        for threads in range(1, parsed.threads):
            yield from measure(
                parsed.model, kind, threads, [Point("threads", threads, 1, here.context)], parsed
            )
    if "model" in parsed.sweeps:
        for size in parsed.sizes:
            folder = parsed.model.parent / f"{size}-random"
            ensure_model(folder, size)
            yield from measure(
                folder, kind, parsed.threads, [Point("model", size, 1, here.context)], parsed
            )


def measure(
    folder: Path, kind: str, threads: int, points: Sequence[Point], parsed: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Load a model and measure points."""
    if not points:
        return
    tell(f"{kind}: {folder.name} with {threads} threads")
    batch = max(point.batch for point in points)
    options = {
        "backend": "numba", "enable_prefix_caching": False, "num_threads": threads,
        "max_num_seqs": batch,
        **OUR_OPTIONS[kind], **parsed.ours,
    }  # fmt: skip
    llm = LLM(folder, **options)
    costs, reader = engine_costs(llm.engine), MemoryReader(threads)
    try:
        for point in points:
            yield {
                **_measure(llm, costs, reader, point, parsed.seed),
                "type": kind,
                "threads": threads,
                "parameters": llm.engine.model.num_parameters,
            }
    finally:
        reader.close()


def _measure(
    llm: LLM, costs: Costs, reader: MemoryReader, point: Point, seed: int
) -> dict[str, Any]:
    """Measure a point; `context` is the mean over its steps."""
    engine = llm.engine
    reading_steps = -(
        -point.batch * point.context // max(1, engine.config.max_num_batched_tokens - point.batch)
    )
    length = _STEPS + reading_steps + 1
    prompt_len = max(1, min(point.context - length // 2, engine.max_model_len - length))
    drawn = (
        np.random.default_rng(seed)
        .integers(0, engine.model.vocab, (point.batch, prompt_len), dtype=np.int64)
        .tolist()
    )
    decode_batch(engine, drawn, length)
    before = reader.bytes_per_s(_READINGS)
    prefill, steps = decode_batch(engine, drawn, length)
    bandwidth = (before + reader.bytes_per_s(_READINGS)) / 2
    step_s = statistics.median(seconds for seconds, _ in steps)
    pairs = round(statistics.mean(pairs for _, pairs in steps))
    return {
        "sweep": point.sweep, "at": point.at, "batch": point.batch,
        "context": pairs / point.batch, "step_s": step_s,
        "decode_tokens_per_s": point.batch / step_s,
        "prefill_tokens_per_s": prefill.tokens_per_s, "bandwidth_bytes_per_s": bandwidth,
        "step_bytes": costs.read_bytes(1, pairs),
        "step_operations": costs.operations(point.batch, pairs, point.batch),
        "prefill_s": prefill.seconds, "prefill_bytes": costs.read_bytes(prefill.steps, 0),
        "prefill_operations": costs.operations(prefill.computed, prefill.pairs, prefill.rows),
    }  # fmt: skip


def decode_batch(
    engine: Engine, prompts: Sequence[list[int]], length: int
) -> tuple[Phase, list[tuple[float, int]]]:
    """Run a batch; return the prefill, and the time and context of each decode step."""
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    batch = engine.input_processor.process(GenerationRequest(prompts=prompts, params=params))
    lengths = {prompt.request_id: prompt.num_prompt_tokens for prompt in batch}
    for prompt in batch:
        engine.add_request(prompt.requests[0])
    prefill = Phase()
    steps: list[tuple[float, int]] = []
    while engine.has_work and len(steps) < _STEPS:
        step = engine.step()
        if step.fault is not None:
            raise EngineFaultError(f"a step of the engine failed: {step.fault}") from step.fault
        if step.stats.num_prompt_tokens:
            prefill.add(step.stats.num_prompt_tokens, step.stats, 0, 0)
        elif step.stats.num_decode_tokens == len(prompts):
            steps.append((step.stats.duration_s, sum(lengths.values())))
        for update in step.updates:
            lengths[update.request_id] += 1
    for request_id in lengths:
        engine.finish_request(request_id, FinishReason.ABORT)
    prefill.pairs = sum(len(prompt) * (len(prompt) + 1) // 2 for prompt in prompts)
    prefill.rows = len(prompts)
    return prefill, steps


def machine_limits(threads: int) -> dict[str, float | None]:
    """Return bytes per second, and operations per second of each type."""
    reader = MemoryReader(threads)
    bandwidth = reader.bytes_per_s()
    reader.close()
    return {
        "bandwidth_bytes_per_s": bandwidth,
        **{kind: measure_peak(kind, threads) for kind in KINDS},
    }


def shown(record: dict[str, Any]) -> str:
    """Format one point."""
    share = record["step_bytes"] / record["step_s"] / record["bandwidth_bytes_per_s"]
    where = f"{record['type']:9} {record['sweep']:8} {record['at']!s:12}"
    step_ms = f"{1000 * record['step_s']:8.2f} ms a step"
    return f"{where} {step_ms}  {record['decode_tokens_per_s']:9,.1f} tok/s  {share:4.0%} of memory"


if __name__ == "__main__":
    sys.exit(main())
