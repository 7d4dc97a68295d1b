"""`nanovllm bench serve`: a load generator with the figures of vLLM's `bench serve`.

A request's time includes opening its connection. Tokens are counted by the server's `usage`,
because a chunk of a stream may carry several tokens. TPOT = (E2EL - TTFT) / (output tokens - 1),
and ITL is the time between chunks.
"""

import argparse
import asyncio
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from nanovllm.cli.bench.drafts import Drafts
from nanovllm.cli.bench.http_client import Server, events, get_json, get_text, reason_of
from nanovllm.cli.bench.lengths import fit_lengths
from nanovllm.cli.bench.options import LoadOptions
from nanovllm.cli.bench.report import publish, shown
from nanovllm.cli.options import options_of
from nanovllm.cli.security_options import keys_in_environment
from nanovllm.errors import counted

_LENGTHS = (128, 64)  # of prompts and outputs, if they fit the context
_TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
_STATISTICS: dict[str, Callable[[np.ndarray], Any]] = {
    "mean": np.mean, "median": np.median, "std": np.std,
    "p99": lambda values: np.percentile(values, 99),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trace:
    """The times of a request as its client saw it; `error` is None on success."""

    start_s: float
    chunk_times_s: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Return the time to the first chunk."""
        return self.chunk_times_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        """Return the time to the last chunk."""
        return self.chunk_times_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Return the time per output token after the first; None for a single token."""
        after_first = self.output_tokens - 1
        return (self.e2el_s - self.ttft_s) / after_first if after_first > 0 else None

    @property
    def itl_s(self) -> list[float]:
        """Return the times between chunks."""
        times_s = self.chunk_times_s
        return [after - before for before, after in pairwise(times_s)]


@dataclass(frozen=True, slots=True)
class Load:
    """The workload: request bodies, and the arrival time of each in seconds from the start."""

    bodies: Sequence[dict[str, Any]]
    arrivals_s: Sequence[float]
    max_concurrency: int | None
    timeout_s: float


def figures_of(traces: Sequence[Trace], duration_s: float) -> dict[str, Any]:
    """Return the figures of the completed requests; times in milliseconds, None without data."""
    done = [trace for trace in traces if trace.error is None]
    input_tokens = sum(trace.input_tokens for trace in done)
    output_tokens = sum(trace.output_tokens for trace in done)
    times_s = {
        "ttft": [trace.ttft_s for trace in done],
        "tpot": [trace.tpot_s for trace in done if trace.tpot_s is not None],
        "itl": [gap for trace in done for gap in trace.itl_s],
        "e2el": [trace.e2el_s for trace in done],
    }
    return {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(traces) - len(done),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "total_cached_tokens": sum(trace.cached_tokens for trace in done),
        "request_throughput": len(done) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        **{
            f"{statistic}_{name}_ms": float(function(1000 * np.array(times))) if times else None
            for name, times in times_s.items()
            for statistic, function in _STATISTICS.items()
        },
    }


def run(parsed: argparse.Namespace) -> int:
    """Run the load and report; return 1 if a request failed."""
    options = options_of(parsed, LoadOptions)
    url = options.base_url if options.port is None else f"http://127.0.0.1:{options.port}"
    server = Server.at(url, options.api_key or next(iter(keys_in_environment(os.environ)), None))
    seed = secrets.randbits(32) if options.seed is None else options.seed
    options, traces, duration_s, drafts = asyncio.run(_measure(server, replace(options, seed=seed)))
    figures = figures_of(traces, duration_s)
    is_unlimited = math.isinf(options.request_rate)
    arrivals = "all at once" if is_unlimited else f"{options.request_rate:g} requests/s"
    most = options.max_concurrency
    eos = ", end of text ignored" if options.ignore_eos else ""
    errors = [trace.error for trace in traces if trace.error is not None]
    about = {
        "server": f"{server.url}, model {options.model}; the machine above is the client's",
        "work": f"{counted(options.num_prompts, 'request')}, "
        f"{options.random_input_len} random tokens in and "
        f"up to {options.random_output_len} out, {arrivals}, "
        f"{'no concurrency limit' if most is None else f'at most {most} concurrent'}",
        "settings": f"temperature {options.temperature:g}{eos}, seed {seed}; "
        f"{figures['total_cached_tokens']:,} tokens came from a prefix cache",
        "errors": f"{len(errors)} of {counted(len(traces), 'request')} failed, the first with: "
        f"{errors[0]}"
        if errors
        else "",
    }
    record = {
        "benchmark": "serve", "base_url": server.url, "model": options.model,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if is_unlimited else options.request_rate,
        "max_concurrency": most, "random_input_len": options.random_input_len,
        "random_output_len": options.random_output_len, "vocab": options.vocab,
        "ignore_eos": options.ignore_eos, "temperature": options.temperature, "seed": seed,
        "first_error": errors[0] if errors else None,
    }  # fmt: skip
    table = _shown_figures(figures) | drafts.shown()
    publish(about, table, {**record, **figures, **drafts.figures()}, options.json)
    return 1 if errors else 0


async def _measure(
    server: Server, options: LoadOptions
) -> tuple[LoadOptions, list[Trace], float, Drafts]:
    """Return the options with the model's name and lengths, all traces, the seconds taken, drafts.

    The drafts are those of the server in this time, by its /metrics; none if it has no such page.
    """
    model, max_model_len = await _find_model(server, options.model)
    input_len, output_len = fit_lengths(
        options.random_input_len, options.random_output_len, _LENGTHS, max_model_len
    )
    random = np.random.default_rng(options.seed)
    shape = (options.num_prompts + 1, input_len)
    prompts = random.integers(0, options.vocab, shape, dtype=np.int64).tolist()
    gaps_s = np.zeros(options.num_prompts, dtype=np.float64)
    if not math.isinf(options.request_rate):
        gaps_s[1:] = random.exponential(1 / options.request_rate, options.num_prompts - 1)
    common = {
        "model": model, "max_tokens": output_len, "temperature": options.temperature,
        "stream": True, "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if options.ignore_eos else {}),
    }  # fmt: skip
    first = await _follow(
        server, {**common, "prompt": prompts[0], "max_tokens": 1}, options.timeout_s
    )
    if first.error is not None:  # report an error of all requests once
        raise ConnectionError(f"a first request failed, so nothing was measured: {first.error}")
    bodies = [{**common, "prompt": prompt} for prompt in prompts[1:]]
    load = Load(bodies, np.cumsum(gaps_s).tolist(), options.max_concurrency, options.timeout_s)
    before = await _drafts(server)
    started_s = time.perf_counter()
    traces = await send(server, load)
    duration_s = time.perf_counter() - started_s
    drafts = (await _drafts(server)).since(before)
    used = replace(options, model=model, random_input_len=input_len, random_output_len=output_len)
    return used, traces, duration_s, drafts


async def _drafts(server: Server) -> Drafts:
    try:
        return Drafts.of_metrics(await get_text(server, "/metrics"))
    except ConnectionError:
        return Drafts()


async def _find_model(server: Server, model: str | None) -> tuple[str, int | None]:
    """Return the model's name, and its context if the server tells it; raises ValueError."""
    answer = await get_json(server, "/v1/models")
    listed = answer.get("data") if isinstance(answer, dict) else None
    models = (
        {str(item["id"]): item for item in listed if isinstance(item, dict) and "id" in item}
        if isinstance(listed, list)
        else {}
    )
    if not models:
        raise ConnectionError(
            f"{server.url}/v1/models lists no models, so it is no OpenAI-compatible server"
        )
    name = model or next(iter(models))
    if name not in models:
        raise ValueError(f"the server has no model {name!r}; --model may be {', '.join(models)}")
    max_model_len = models[name].get("max_model_len")
    return name, max_model_len if isinstance(max_model_len, int) else None


async def send(server: Server, load: Load) -> list[Trace]:
    """Send each request at its arrival time and return all traces."""
    gate: AbstractAsyncContextManager[Any] = (
        asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else nullcontext()
    )
    with tqdm(total=len(load.bodies), desc="Requests", unit="request", disable=None) as progress:

        async def one(body: dict[str, Any]) -> Trace:
            async with gate:
                trace = await _follow(server, body, load.timeout_s)
            progress.update()
            return trace

        started_s = time.perf_counter()
        tasks = []
        for body, arrival_s in zip(load.bodies, load.arrivals_s, strict=True):
            wait_s = started_s + arrival_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(one(body)))
        return list(await asyncio.gather(*tasks))


async def _follow(server: Server, body: dict[str, Any], timeout_s: float) -> Trace:
    """Send one request and read its stream; errors are in the trace."""
    start_s = time.perf_counter()
    try:
        return await asyncio.wait_for(_stream(server, body, start_s), timeout_s)
    except asyncio.TimeoutError:
        return Trace(
            start_s,
            error=f"the response was not complete within {timeout_s:g} s; raise --timeout-s or "
            "send less at once",
        )
    except OSError as error:
        return Trace(start_s, error=str(error))


async def _stream(server: Server, body: dict[str, Any], start_s: float) -> Trace:
    times_s: list[float] = []
    usage: dict[str, Any] = {}
    async with aclosing(events(server, "/v1/completions", body)) as stream:
        async for now, event in stream:
            if not isinstance(event, dict) or "error" in event:
                error = event.get("error") if isinstance(event, dict) else event
                raise ConnectionError(f"the stream broke off: {reason_of(error)}")
            if event.get("choices"):
                times_s.append(now)
            usage = event.get("usage") or usage
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not times_s or not all(isinstance(count, int) for count in counts):
        raise ConnectionError(
            "the stream had no text or no usage; the server must support include_usage"
        )
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Trace(
        start_s,
        tuple(times_s),
        int(usage["prompt_tokens"]),
        int(usage["completion_tokens"]),
        int(cached),
    )


def _shown_figures(figures: dict[str, Any]) -> dict[str, str]:
    lines = {
        "completed": f"{figures['completed']:,}",
        "failed": f"{figures['failed']:,}",
        "duration": shown(figures["duration"], "s"),
        "input tokens": f"{figures['total_input_tokens']:,}",
        "output tokens": f"{figures['total_output_tokens']:,}",
        "requests": shown(figures["request_throughput"], "/s"),
        "output": shown(figures["output_throughput"], "tok/s", 1),
        "input and output": shown(figures["total_token_throughput"], "tok/s", 1),
    }
    for name, label in _TIMES.items():
        for statistic in _STATISTICS:
            lines[f"{label} ({name.upper()}), {statistic}"] = shown(
                figures[f"{statistic}_{name}_ms"], "ms"
            )
    return lines
