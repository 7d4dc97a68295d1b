"""`nanovllm bench profile`: where the time of a step goes, by operation and by thread.

It is a step of a real engine: all sequences decode a token, or all prompts are computed. The
figures are medians of several steps; the picture shows the step of median duration.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanovllm.cli.bench.offline import (
    Bench,
    about_engine,
    lengths_of,
    random_jobs,
    read_options,
    record_engine,
)
from nanovllm.cli.bench.options import ProfileOptions
from nanovllm.cli.bench.report import publish, shown
from nanovllm.cli.bench.roofline import WEIGHT_BYTES, Costs, Limits, fraction, percent
from nanovllm.errors import counted

if TYPE_CHECKING:
    from nanovllm.cli.bench.step_times import StepTimes

Key = TypeVar("Key")
_INPUT_LEN, _OUTPUT_LEN = 128, 32  # of decoding


def run_profile(parsed: argparse.Namespace) -> int:
    """Measure the steps, print the tables, and draw the picture."""
    config, options = read_options(parsed, ProfileOptions)
    if config.backend != "numba":
        raise ValueError(
            f"backend is {config.backend!r}, but only the compiled kernels note their times; "
            "leave --backend out"
        )
    config = replace(config, enable_prefix_caching=False)  # every step computes all of its tokens
    batch_size = options.batch_size or (1 if options.prefill else config.max_num_seqs)
    in_step = config.max_num_batched_tokens
    defaults = (in_step // batch_size, 1) if options.prefill else (_INPUT_LEN, _OUTPUT_LEN)
    input_len, _ = lengths_of(options, config, defaults)
    if options.prefill and batch_size * input_len > in_step:
        raise ValueError(
            f"a step computes up to {in_step:,} tokens, but the prompts have "
            f"{batch_size * input_len:,}; shorten them, or raise --max-num-batched-tokens"
        )
    bench = Bench.load(options.model, config, temperature=0.0)
    readings = [Limits.measure(bench.engine)] if options.limits else []
    steps = profile(bench, batch_size, input_len, options.num_iters, is_prefill=options.prefill)
    limits = Limits.mean([*readings, Limits.measure(bench.engine)]) if readings else None
    figures = figures_of(bench, steps, limits)
    name = "prefill" if options.prefill else "decode"
    sequences = counted(batch_size, "prompt" if options.prefill else "sequence")
    work = f"{name} step of {sequences} of {counted(input_len, 'token')}"
    about = about_engine(options.model, bench) | {
        "work": f"a {work}, {counted(options.num_iters, 'time')}",
        "limits": "not measured" if limits is None else str(limits),
    }
    record = {
        "benchmark": "profile", "step": name, "batch_size": batch_size, "input_len": input_len,
        "num_iters": options.num_iters, **figures, "limits": limits and asdict(limits),
        **record_engine(options.model, bench),
    }  # fmt: skip
    publish(about, _table(figures), record, options.json)
    if options.svg is not None:
        from nanovllm.cli.bench.timeline import draw_timeline

        kind = bench.engine.runner.backend.weight_dtype
        title = f"{work.capitalize()}: {Path(options.model).name}, {kind}"
        options.svg.write_text(draw_timeline(middle_step(steps), title), encoding="utf-8")
    return 0


def profile(
    bench: Bench, batch_size: int, input_len: int, count: int, *, is_prefill: bool
) -> "list[StepTimes]":
    """Return the times of `count` steps in which so many sequences decode, or are computed.

    `input_len` is the length of their prompts in tokens. Raises ValueError for sequences that do
    not run in one step.
    """
    from nanovllm.cli.bench.step_times import time_steps  # imports Numba

    output_len = 1 if is_prefill else bench.engine.max_model_len - input_len
    jobs = random_jobs(bench.engine, batch_size, input_len, output_len)
    return time_steps(bench, jobs, count, is_prefill=is_prefill)


def middle_step(steps: "Sequence[StepTimes]") -> "StepTimes":
    """Return the step of median duration."""
    return sorted(steps, key=lambda step: step.seconds)[len(steps) // 2]


def figures_of(bench: Bench, steps: "Sequence[StepTimes]", limits: Limits | None) -> dict[str, Any]:
    """Return medians in seconds: of the step, of each operation, and of each thread.

    Matmuls have their operations and the bytes of their weights, attention the bytes of keys and
    values, and these the fractions of `limits` that they reach; None without limits.
    """
    step_s = statistics.median(step.seconds for step in steps)
    amounts = _amounts(bench, middle_step(steps))
    bandwidth, peak = (limits.bandwidth, limits.peak) if limits else (None, None)
    operations = []
    for name, (seconds, wait_s) in _medians([step.by_operation() for step in steps]).items():
        num_bytes, computed = amounts.get(name, (None, None))
        operations.append(
            {
                "name": name,
                "seconds": seconds,
                "share": seconds / step_s,
                "wait_s": wait_s,
                "bytes": num_bytes,
                "operations": computed,
                "bandwidth_fraction": _reached(num_bytes, seconds, bandwidth),
                "peak_fraction": _reached(computed, seconds, peak),
            }
        )
    by_thread = _medians([dict(enumerate(step.by_thread())) for step in steps])
    threads = [
        {"computing_s": computing_s, "wait_s": wait_s} for computing_s, wait_s in by_thread.values()
    ]
    return {"step_s": step_s, "operations": operations, "threads": threads}


def _medians(steps: Sequence[Mapping[Key, tuple[float, float]]]) -> dict[Key, tuple[float, float]]:
    """Return the medians over steps of both figures of each key."""
    return {
        key: (
            statistics.median(step[key][0] for step in steps),
            statistics.median(step[key][1] for step in steps),
        )
        for key in steps[0]
    }


def _reached(amount: float | None, seconds: float, limit_per_s: float | None) -> float | None:
    return None if amount is None else fraction(amount, seconds, limit_per_s)


def _amounts(bench: Bench, step: "StepTimes") -> dict[str, tuple[float, int | None]]:
    """Return the bytes that operations read, and their arithmetic operations, of all layers."""
    model, kind = bench.engine.model, bench.engine.runner.backend.weight_dtype
    widths = {
        "qkv": model.qkv_width,
        "out": model.queries_width,
        "up": model.up_width,
        "down": model.d_ff,
    }
    sizes = {name: model.layers * model.d_model * width for name, width in widths.items()}
    sizes["head"] = model.d_model * model.vocab
    amounts: dict[str, tuple[float, int | None]] = {
        name: (size * WEIGHT_BYTES[kind], 2 * size * (step.rows if name == "head" else step.tokens))
        for name, size in sizes.items()
    }
    return amounts | {"attention": (step.keys * Costs.of_engine(bench.engine).pair_bytes, None)}


def _table(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each operation and each thread, after the columns' names and units."""
    lines: dict[str, tuple[str, ...]] = {
        "operation": ("time", "of the step", "waiting", "bandwidth", "peak"),
        "": ("ms", "", "ms"),
    }
    for each in figures["operations"]:
        reached = (each["bandwidth_fraction"], each["peak_fraction"])
        lines[each["name"]] = (
            _ms(each["seconds"]), percent(each["share"]), _ms(each["wait_s"]),
            *("" if share is None else percent(share) for share in reached),
        )  # fmt: skip
    lines["step"] = (_ms(figures["step_s"]), percent(1.0))
    lines[" "] = ()
    lines["thread"] = ("computing", "of the step", "waiting", "of the step")
    for number, each in enumerate(figures["threads"]):
        lines[f"{number}"] = tuple(
            form
            for seconds in each.values()
            for form in (_ms(seconds), percent(seconds / figures["step_s"]))
        )
    return {label: "".join(f"{value:>12}" for value in values) for label, values in lines.items()}


def _ms(seconds: float) -> str:
    return shown(1e3 * seconds, digits=2)
