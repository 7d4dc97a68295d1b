"""`nanovllm bench latency` and `throughput`: an engine in this process, without HTTP.

Steps that compute prompt tokens count as prefill, even if they also decode; all others count as
decode. Prefix caching is off by default, so that every counted token is computed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from nanovllm.cli.argument_types import print_message, read_lines
from nanovllm.cli.bench.drafts import Drafts
from nanovllm.cli.bench.lengths import check_fits, fit_lengths
from nanovllm.cli.bench.options import LatencyOptions, OfflineOptions, ThroughputOptions
from nanovllm.cli.bench.report import publish, rate, shown
from nanovllm.cli.bench.roofline import Costs, Limits, Phases, fractions, shown_fractions
from nanovllm.cli.numa import numa_warning
from nanovllm.cli.options import engine_config, options_of
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.errors import EngineFaultError, InvalidRequestError, counted
from nanovllm.hub import resolve_model, resolve_models
from nanovllm.model.families.registry import load_config
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)
_LATENCY_LENGTHS, _THROUGHPUT_LENGTHS = (32, 128), (128, 64)
_NUM_PROMPTS = 32
AnyOptions = TypeVar("AnyOptions", bound=OfflineOptions)
_EXAMPLE_LINE = '{"prompt": "Once upon a time", "max_tokens": 64}'


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and the number of tokens to generate; `name` is for errors."""

    name: str
    prompt: Prompt
    output_len: int


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

    @classmethod
    def load(cls, model: str, config: EngineConfig, temperature: float) -> "Bench":
        """Check the temperature, then load the model."""
        folder, config = resolve_models(model, config)
        SamplingParams(temperature=temperature)
        return cls(Engine.load(folder, config), temperature)

    def run(self, jobs: Sequence[Job], on_finish: Callable[[], object] = lambda: None) -> Totals:
        """Run all jobs as one batch; raises ContextLengthError if one does not fit."""
        started_s = time.perf_counter()
        prompts = [self.process(job) for job in jobs]
        by_id = {prompt.request_id: prompt for prompt in prompts}
        lengths = dict.fromkeys(by_id, 0)
        window = self.engine.model.window or self.engine.max_model_len
        for step in self.engine.run(prompts):
            pairs = rows = keys = 0
            for update in (update for update in step.updates if update.token_ids):
                prompt, length = by_id[update.request_id], lengths[update.request_id]
                drafted = len(update.drafted)
                of_rows = [_pairs(prompt, length + index, window) for index in range(1 + drafted)]
                pairs, rows, keys = pairs + sum(of_rows), rows + 1 + drafted, keys + of_rows[-1]
                lengths[update.request_id] += len(update.token_ids)
            self.phases.add(step.stats, pairs, rows, keys)
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
        return Totals(
            duration_s,
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(len(output.outputs[0].token_ids) for output in outputs),
            cached_tokens,
        )

    def process(self, job: Job) -> PromptRequest:
        """Return a job as a prompt for the engine; raises ContextLengthError if it does not fit."""
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


def read_options(
    parsed: argparse.Namespace, kind: type[AnyOptions]
) -> tuple[EngineConfig, AnyOptions]:
    """Return the settings of the engine and the options of a benchmark; warn of NUMA nodes.

    Raises ValueError for a batch that does not run in one step.
    """
    config, options = engine_config(parsed), options_of(parsed, kind)
    batch_size = getattr(options, "batch_size", None) or 1
    if batch_size > config.max_num_seqs:
        raise ValueError(
            f"--batch-size is {batch_size}, but only {config.max_num_seqs} sequences run "
            "in one step; lower it or raise --max-num-seqs"
        )
    if warning := numa_warning("nanovllm bench"):
        print_message(warning)
    return config, options


def run_latency(parsed: argparse.Namespace) -> int:
    """Measure the latency of a batch, repeatedly."""
    config, options = read_options(parsed, LatencyOptions)
    input_len, output_len = lengths_of(options, config, _LATENCY_LENGTHS)
    bench = Bench.load(options.model, config, options.temperature)
    jobs = random_jobs(bench.engine, options.batch_size, input_len, output_len)
    for _ in _batches(options.num_iters_warmup, "Warm-up", leave=False):
        bench.run(jobs)
    measured, before = (
        Bench(bench.engine, bench.temperature),
        Drafts.of_engine(bench.engine.stats()),
    )
    limits = [Limits.measure(bench.engine)] if options.limits else []
    runs = [measured.run(jobs) for _ in _batches(options.num_iters, "Batches")]
    limits += [Limits.measure(bench.engine)] if options.limits else []

    latencies = np.array([run.duration_s for run in runs], dtype=np.float64)
    times_s = {"avg_latency_s": float(latencies.mean())} | {
        f"p{percent}_latency_s": float(np.percentile(latencies, percent)) for percent in PERCENTILES
    }
    about = {
        **about_engine(options.model, bench),
        "work": f"a batch of {options.batch_size}, each {counted(input_len, 'token')} in and "
        f"{output_len} out, {options.num_iters} times after {options.num_iters_warmup} to warm up",
    }
    table = {
        label.removesuffix("_s").replace("_", " "): shown(time_s, "s", 4)
        for label, time_s in times_s.items()
    }
    drafts = Drafts.of_engine(bench.engine.stats()).since(before)
    table |= _shown_phases(measured) | drafts.shown()
    record: dict[str, Any] = {
        "benchmark": "latency", "batch_size": options.batch_size, "input_len": input_len,
        "output_len": output_len, "num_iters": options.num_iters,
        "num_iters_warmup": options.num_iters_warmup,
        **_token_totals(runs), **times_s, **measured.phases.figures(), **drafts.figures(),
    }  # fmt: skip
    if limits:
        limit = Limits.mean(limits)
        reached = fractions(Costs.of_engine(bench.engine), limit, measured.phases)
        about["limits"] = str(limit)
        table |= shown_fractions(reached, limit)
        record |= {**reached, "limits": asdict(limit)}
    record |= {"latencies_s": latencies.tolist(), **record_engine(options.model, bench)}
    publish(about, table, record, options.json)
    return 0


def run_throughput(parsed: argparse.Namespace) -> int:
    """Measure the throughput of prompts that are all submitted at the start."""
    config, options = read_options(parsed, ThroughputOptions)
    jobs, input_len, output_len = [], None, None
    if options.dataset is not None:
        default_len = options.output_len or _THROUGHPUT_LENGTHS[1]
        jobs = read_dataset(options.dataset, options.num_prompts, default_len)
        source = f"from {options.dataset}"
    else:
        input_len, output_len = lengths_of(options, config, _THROUGHPUT_LENGTHS)
        source = f"random, {counted(input_len, 'token')} in and {output_len} out each"
    bench = Bench.load(options.model, config, options.temperature)
    if input_len is not None and output_len is not None:
        count = options.num_prompts or _NUM_PROMPTS
        jobs = random_jobs(bench.engine, count, input_len, output_len)
    bench.engine.warm_up()
    with tqdm(total=len(jobs), desc="Prompts", unit="prompt", disable=None) as progress:
        total = bench.run(jobs, progress.update)
    drafts = Drafts.of_engine(bench.engine.stats())
    figures = {
        "duration_s": total.duration_s,
        "requests_per_s": rate(len(jobs), total.duration_s),
        "total_tokens_per_s": rate(total.input_tokens + total.output_tokens, total.duration_s),
        "output_tokens_per_s": rate(total.output_tokens, total.duration_s),
    }
    about = {
        **about_engine(options.model, bench),
        "work": f"{counted(len(jobs), 'prompt')} at once, {source}: "
        f"{total.input_tokens:,} tokens in and {total.output_tokens:,} out",
    }
    table = {
        "duration": shown(figures["duration_s"], "s"),
        "requests": shown(figures["requests_per_s"], "/s"),
        "all tokens": shown(figures["total_tokens_per_s"], "tok/s", 1),
        "output tokens": shown(figures["output_tokens_per_s"], "tok/s", 1),
        **_shown_phases(bench),
        **drafts.shown(),
    }
    record = {
        "benchmark": "throughput", "num_prompts": len(jobs),
        "dataset": None if options.dataset is None else str(options.dataset),
        "input_len": input_len, "output_len": output_len,
        **_token_totals([total]), **figures, **bench.phases.figures(), **drafts.figures(),
        **record_engine(options.model, bench),
    }  # fmt: skip
    publish(about, table, record, options.json)
    return 0


def _batches(count: int, name: str, *, leave: bool = True) -> Iterable[int]:
    return tqdm(range(count), desc=name, unit="batch", disable=None, leave=leave)


def _pairs(prompt: PromptRequest, num_generated: int, window: int) -> int:
    """Return the query-key pairs of the next token; for the first, those of the whole prompt."""
    length = prompt.num_prompt_tokens + num_generated
    seen = min(length, window)
    return seen if num_generated else seen * (seen + 1) // 2 + (length - seen) * seen


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


def lengths_of(
    options: OfflineOptions, config: EngineConfig, defaults: tuple[int, int]
) -> tuple[int, int]:
    """Return the lengths of prompts and outputs, which fit the context."""
    context = load_config(resolve_model(options.model)).max_positions
    max_model_len = min(config.max_model_len or context, context)
    output_len = getattr(options, "output_len", None)
    return fit_lengths(options.input_len, output_len, defaults, max_model_len)


def random_jobs(engine: Engine, count: int, input_len: int, output_len: int) -> list[Job]:
    """Return prompts of random tokens, the same for the same seed of the engine."""
    random = np.random.default_rng(engine.config.seed)
    prompts = random.integers(0, engine.model.vocab, (count, input_len), dtype=np.int64).tolist()
    return [Job(f"prompt {index}", prompt, output_len) for index, prompt in enumerate(prompts)]


def about_engine(name: str, bench: Bench) -> dict[str, str]:
    """Return the lines of a report that describe the model and its settings."""
    engine = bench.engine
    model, config = engine.model, engine.config
    caching = "on" if config.enable_prefix_caching else "off"
    exact = ", batch_invariant" if config.batch_invariant else ""
    return {
        "model": f"{name}, {model.num_parameters:,} parameters, {model.layers} layers, "
        f"d_model {model.d_model}, vocabulary {model.vocab:,}, context {engine.max_model_len:,}",
        "settings": f"{engine.runner.backend.weight_dtype}, KV cache "
        f"{engine.runner.backend.cache_dtype}, backend {config.backend}, max_num_seqs "
        f"{config.max_num_seqs}, max_num_batched_tokens {config.max_num_batched_tokens}, "
        f"block_size {config.block_size}, prefix caching {caching}, temperature "
        f"{bench.temperature:g}{exact}",
    }


def _token_totals(runs: Sequence[Totals]) -> dict[str, int]:
    return {
        "total_input_tokens": sum(run.input_tokens for run in runs),
        "total_output_tokens": sum(run.output_tokens for run in runs),
        "total_cached_tokens": sum(run.cached_tokens for run in runs),
    }


def record_engine(name: str, bench: Bench) -> dict[str, Any]:
    """Return what the JSON of a report says about the model and its settings."""
    engine = bench.engine
    return {
        "model": name, "parameters": engine.model.num_parameters,
        "temperature": bench.temperature,
        "prefix_caching": engine.config.enable_prefix_caching,
        "num_preemptions": engine.stats().num_preemptions,
        "settings": asdict(engine.config),
    }  # fmt: skip


def _shown_phases(bench: Bench) -> dict[str, str]:
    preemptions = bench.engine.stats().num_preemptions
    return {
        "prefill": shown(bench.phases.prefill.tokens_per_s, "tok/s", 1),
        "decode": shown(bench.phases.decode.tokens_per_s, "tok/s", 1),
        "preemptions": f"{preemptions:,}" if preemptions else "",
    }
