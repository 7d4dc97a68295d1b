"""`nanovllm bench latency` and `throughput`: an engine in this process, without HTTP.

Steps that compute prompt tokens count as prefill, even if they also decode; all others count as
decode. Prefix caching is off by default, so that every counted token is computed.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanovllm.cli.argument_types import read_lines
from nanovllm.cli.bench.lengths import check_fits, fit_lengths
from nanovllm.cli.bench.report import finish, rate, show, shown
from nanovllm.cli.bench.roofline import (
    Limits,
    Phase,
    engine_costs,
    fractions,
    shown_fractions,
    shown_limits,
    weight_kind,
)
from nanovllm.cli.options import engine_config
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.errors import EngineFaultError, InvalidRequestError
from nanovllm.hub import resolve_model
from nanovllm.model.config import GPT2Config
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)
_EXAMPLE_LINE = '{"prompt": "Once upon a time", "max_tokens": 64}'


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and the number of tokens to generate; `name` is for errors."""

    name: str
    prompt: Prompt
    output_len: int


@dataclass(slots=True)
class Phases:
    """The totals of prefill and decode steps."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)

    def add(self, stats: StepStats, pairs: int = 0, rows: int = 0) -> None:
        """Add a step; `pairs` and `rows` as in Phase."""
        if stats.num_prompt_tokens:
            self.prefill.add(stats.num_prompt_tokens, stats, pairs, rows)
        else:
            self.decode.add(stats.num_decode_tokens, stats, pairs, rows)

    def figures(self) -> dict[str, float | None]:
        """Return tokens per second of each phase; None without steps."""
        return {
            "prefill_tokens_per_s": self.prefill.tokens_per_s,
            "decode_tokens_per_s": self.decode.tokens_per_s,
        }


@dataclass(frozen=True, slots=True)
class Totals:
    """Duration and tokens of one run of a batch."""

    duration_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A loaded engine and its measurements."""

    engine: Engine
    temperature: float
    phases: Phases = field(default_factory=Phases)

    def run(self, jobs: Sequence[Job], on_finish: Callable[[], object] = lambda: None) -> Totals:
        """Run all jobs as one batch; raises ContextLengthError if one does not fit."""
        started_s = time.perf_counter()
        prompts = [self._process(job) for job in jobs]
        by_id = {prompt.request_id: prompt for prompt in prompts}
        lengths = dict.fromkeys(by_id, 0)
        for step in self.engine.run(prompts):
            sampled = [update.request_id for update in step.updates if update.token_ids]
            self.phases.add(
                step.stats,
                sum(_pairs(by_id[name], lengths[name]) for name in sampled),
                len(sampled),
            )
            for name in sampled:
                lengths[name] += 1
            for update in step.updates:
                prompt = by_id[update.request_id]
                if prompt.error is not None:
                    raise EngineFaultError(prompt.error)
                if prompt.is_finished:
                    on_finish()
        outputs = [prompt.output() for prompt in prompts]
        duration_s = time.perf_counter() - started_s
        cached_tokens = sum(output.num_cached_tokens for output in outputs)
        assert cached_tokens == 0 or self.engine.config.enable_prefix_caching
        input_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        return Totals(
            duration_s,
            input_tokens,
            sum(len(output.outputs[0].token_ids) for output in outputs),
            cached_tokens,
        )

    def _process(self, job: Job) -> PromptRequest:
        params = SamplingParams(
            max_tokens=job.output_len, temperature=self.temperature, ignore_eos=True
        )
        try:
            (processed,) = self.engine.input_processor.process(
                GenerationRequest(prompts=[job.prompt], params=params, request_id="bench")
            )
        except InvalidRequestError as error:
            raise error.at(job.name) from error
        check_fits(
            f"{job.name}: a prompt",
            processed.num_prompt_tokens,
            job.output_len,
            self.engine.max_model_len,
        )
        return processed


def run_latency(parsed: argparse.Namespace) -> int:
    """Measure the latency of a batch, repeatedly."""
    config = engine_config(parsed)
    if parsed.batch_size > config.max_num_seqs:
        raise ValueError(
            f"--batch-size is {parsed.batch_size}, but only {config.max_num_seqs} sequences run in "
            "one step; lower it or raise --max-num-seqs"
        )
    _fit_lengths(parsed)
    bench = _load(parsed)
    jobs = _random_jobs(bench.engine, parsed, parsed.batch_size)
    for _ in tqdm(
        range(parsed.num_iters_warmup), desc="Warm-up", unit="batch", disable=None, leave=False
    ):
        bench.run(jobs)
    measured = Bench(bench.engine, bench.temperature)
    before = [Limits.measure(config)] if parsed.limits else []
    runs = [
        measured.run(jobs)
        for _ in tqdm(range(parsed.num_iters), desc="Batches", unit="batch", disable=None)
    ]
    limits = Limits.mean([*before, Limits.measure(config)]) if parsed.limits else None
    _report_latency(parsed, measured, runs, limits)
    return 0


def _report_latency(
    parsed: argparse.Namespace, measured: Bench, runs: Sequence[Totals], limits: Limits | None
) -> None:
    """Print a table and a line of JSON."""
    latencies = np.array([run.duration_s for run in runs], dtype=np.float64)
    figures = {
        "avg_latency_s": float(latencies.mean()),
        **{
            f"p{percent}_latency_s": float(np.percentile(latencies, percent))
            for percent in PERCENTILES
        },
        **measured.phases.figures(),
    }
    reached = (
        None
        if limits is None
        else fractions(
            engine_costs(measured.engine), limits, measured.phases.prefill, measured.phases.decode
        )
    )
    work = (
        f"a batch of {parsed.batch_size}, each {parsed.input_len} tokens in and "
        f"{parsed.output_len} out, {parsed.num_iters} times"
    )
    show(
        {
            **_about(parsed, measured.engine),
            "work": f"{work} after {parsed.num_iters_warmup} to warm up",
        }
        | ({} if limits is None else {"limits": shown_limits(limits)}),
        {
            label.removesuffix("_s").replace("_", " "): shown(figures[label], "s", 4)
            for label in figures
            if label.endswith("latency_s")
        }
        | _shown_phases(figures, measured.engine)
        | ({} if limits is None or reached is None else shown_fractions(reached, limits)),
    )
    counts = {
        "batch_size": parsed.batch_size, "input_len": parsed.input_len,
        "output_len": parsed.output_len,
        "num_iters": parsed.num_iters, "num_iters_warmup": parsed.num_iters_warmup,
        "total_input_tokens": sum(run.input_tokens for run in runs),
        "total_output_tokens": sum(run.output_tokens for run in runs),
        "total_cached_tokens": sum(run.cached_tokens for run in runs),
    }  # fmt: skip
    compared = {} if limits is None or reached is None else {**reached, "limits": asdict(limits)}
    finish(
        {
            "benchmark": "latency",
            **counts,
            **figures,
            **compared,
            "latencies_s": latencies.tolist(),
            **_record(parsed, measured.engine),
        },
        parsed.json,
    )


def run_throughput(parsed: argparse.Namespace) -> int:
    """Measure the throughput of prompts that are all submitted at the start."""
    dataset = None
    if parsed.dataset is None:
        _fit_lengths(parsed)
    else:
        output_len = parsed.output_len or parsed.default_lengths[1]
        dataset = read_dataset(parsed.dataset, parsed.num_prompts, output_len)
    bench = _load(parsed)
    jobs = dataset or _random_jobs(bench.engine, parsed, parsed.num_prompts or 32)
    bench.engine.warm_up()
    with tqdm(total=len(jobs), desc="Prompts", unit="prompt", disable=None) as progress:
        total = bench.run(jobs, progress.update)
    figures = {
        "duration_s": total.duration_s,
        "requests_per_s": rate(len(jobs), total.duration_s),
        "total_tokens_per_s": rate(total.input_tokens + total.output_tokens, total.duration_s),
        "output_tokens_per_s": rate(total.output_tokens, total.duration_s),
        **bench.phases.figures(),
    }
    source = (
        f"random, {parsed.input_len} tokens in and {parsed.output_len} out each"
        if dataset is None
        else f"from {parsed.dataset}"
    )
    show(
        {
            **_about(parsed, bench.engine),
            "work": f"{len(jobs)} prompts at once, {source}: {total.input_tokens:,} tokens in and "
            f"{total.output_tokens:,} out",
        },
        {
            "duration": shown(figures["duration_s"], "s"),
            "requests": shown(figures["requests_per_s"], "/s"),
            "all tokens": shown(figures["total_tokens_per_s"], "tok/s", 1),
            "output tokens": shown(figures["output_tokens_per_s"], "tok/s", 1),
        }
        | _shown_phases(figures, bench.engine),
    )
    counts = {
        "num_prompts": len(jobs), "dataset": None if dataset is None else str(parsed.dataset),
        "input_len": parsed.input_len if dataset is None else None,
        "output_len": parsed.output_len if dataset is None else None,
        "total_input_tokens": total.input_tokens, "total_output_tokens": total.output_tokens,
        "total_cached_tokens": total.cached_tokens,
    }  # fmt: skip
    finish(
        {"benchmark": "throughput", **counts, **figures, **_record(parsed, bench.engine)},
        parsed.json,
    )
    return 0


def _pairs(prompt: PromptRequest, num_generated: int) -> int:
    """Return the query-key pairs of the next token; for the first, those of the whole prompt."""
    length = prompt.num_prompt_tokens + num_generated
    return length if num_generated else length * (length + 1) // 2


def read_dataset(path: Path, limit: int | None, output_len: int) -> list[Job]:
    """Read the first `limit` prompts of a JSON Lines file; raises ValueError with the line.

    A line is {"prompt": text or token ids, "max_tokens": integer}; `max_tokens` is optional, and
    other fields are ignored.
    """
    jobs: list[Job] = []
    for number, line in read_lines(path):
        if limit is not None and len(jobs) == limit:
            break
        name = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        if not isinstance(item, dict) or "prompt" not in item:
            raise ValueError(f"{name} must be an object with a prompt, such as {_EXAMPLE_LINE}")
        max_tokens = item.get("max_tokens")
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise ValueError(
                f"{name}: max_tokens is {max_tokens!r} but must be an integer of at least 1"
            )
        jobs.append(Job(name, item["prompt"], output_len if max_tokens is None else max_tokens))
    if not jobs:
        raise ValueError(f"{path} has no prompts; it needs lines such as {_EXAMPLE_LINE}")
    return jobs


def _fit_lengths(parsed: argparse.Namespace) -> None:
    """Set the lengths that the command line leaves out, to fit the context."""
    max_positions = GPT2Config.load(resolve_model(parsed.model)).max_positions
    max_model_len = min(engine_config(parsed).max_model_len or max_positions, max_positions)
    parsed.input_len, parsed.output_len = fit_lengths(
        parsed.input_len, parsed.output_len, parsed.default_lengths, max_model_len
    )


def _load(parsed: argparse.Namespace) -> Bench:
    """Check the settings, then load the engine."""
    config, folder = engine_config(parsed), resolve_model(parsed.model)
    SamplingParams(temperature=parsed.temperature)
    return Bench(Engine.load(folder, config), parsed.temperature)


def _random_jobs(engine: Engine, parsed: argparse.Namespace, count: int) -> list[Job]:
    token_ids = np.random.default_rng(parsed.seed).integers(
        0, engine.model.vocab, (count, parsed.input_len), dtype=np.int64
    )
    return [
        Job(f"prompt {index}", prompt, parsed.output_len)
        for index, prompt in enumerate(token_ids.tolist())
    ]


def _about(parsed: argparse.Namespace, engine: Engine) -> dict[str, str]:
    model, config = engine.model, engine.config
    caching = "on" if config.enable_prefix_caching else "off"
    sizes = (
        f"{model.num_parameters:,} parameters, {model.layers} layers, d_model {model.d_model}, "
        f"vocabulary {model.vocab:,}"
    )
    limits = (
        f"max_num_seqs {config.max_num_seqs}, max_num_batched_tokens "
        f"{config.max_num_batched_tokens}, block_size {config.block_size}"
    )
    exact = ", batch_invariant" if config.batch_invariant else ""
    cache_dtype = engine.runner.backend.cache_dtype
    types = f"{weight_kind(config)}, KV cache {cache_dtype}, backend {config.backend}"
    return {
        "model": f"{parsed.model}, {sizes}, context {engine.max_model_len:,}",
        "settings": f"{types}, {limits}, prefix caching {caching}, "
        f"temperature {parsed.temperature:g}{exact}",
    }


def _record(parsed: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    return {
        "model": parsed.model, "parameters": engine.model.num_parameters,
        "temperature": parsed.temperature,
        "prefix_caching": engine.config.enable_prefix_caching,
        "num_preemptions": engine.stats().num_preemptions,
        "settings": asdict(engine.config),
    }  # fmt: skip


def _shown_phases(figures: dict[str, Any], engine: Engine) -> dict[str, str]:
    lines = {
        name: shown(figures[f"{name}_tokens_per_s"], "tok/s", 1) for name in ("prefill", "decode")
    }
    preemptions = engine.stats().num_preemptions
    return {**lines, "preemptions": f"{preemptions:,}"} if preemptions else lines
