"""GET /metrics: the engine's numbers in Prometheus's text format, and counts of HTTP requests.

Names, labels and meanings are those of vLLM (v1/metrics/loggers.py), with the prefix `nanovllm:`;
HTTP requests are counted as vLLM's prometheus-fastapi-instrumentator does. The series, and those
that vLLM does not have, are listed in docs/reference/metrics.md. Gauges and counters are read from
the engine at each scrape; histograms are fed after each step. The low buckets are finer than
vLLM's, because small models answer in milliseconds.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from pydantic import Field
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope
from typing_extensions import TypedDict

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import FinishedRequest, StepStats


class LatencyHistogram(TypedDict):
    """A histogram since the start, with the buckets of /metrics."""

    bounds: Annotated[list[float], Field(description="upper bounds in seconds")]
    counts: Annotated[
        list[int], Field(description="in each bucket; the last one is above the last bound")
    ]


METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
)  # fmt: skip
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

_GAUGES: dict[str, tuple[str, ...]] = {
    "num_requests_running": ("Sequences in the running batch.",),
    "num_requests_waiting": ("Sequences that wait for their turn.",),
    "num_requests_waiting_by_reason": (
        "Sequences that wait for a seat or KV blocks (capacity), or for a grammar (deferred).",
        "reason",
    ),
    "kv_cache_usage_perc": ("Share of the KV cache in use, from 0 to 1.",),
    "queued_requests": ("Unfinished choices, of --max-queued-requests.",),
    "queued_tokens": ("Maximum total tokens of their requests.",),
    "queued_tokens_limit": ("Maximum of queued_tokens.",),
}
"""Help by name, and the label of series that have one beside model_name."""
_COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": (
        "Tokens of the prompts that were read, those from the prefix cache included.",
    ),
    "prompt_tokens_by_source": (
        "Prompt tokens by where their keys and values came from.",
        "source",
    ),
    "prompt_tokens_cached": (
        "Prompt tokens that were not computed: from the prefix cache, or shared by n choices.",
    ),
    "prompt_tokens_computed": (
        "Tokens that prefill computed, those of preempted sequences again.",
    ),
    "generation_tokens": ("Tokens generated.",),
    "num_preemptions": ("Preemptions of sequences.",),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.",),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.",),
    "request_refused": (
        "Requests that found the queue full, by the limit that they met.",
        "limit",
    ),
    "request_timeout": ("Requests that exceeded their deadline, by where they stood.", "stage"),
}
DRAFT_COUNTERS: dict[str, tuple[str, ...]] = {
    "spec_decode_num_drafts": ("Drafts that were verified.",),
    "spec_decode_num_draft_tokens": ("Tokens of these drafts.",),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that are in the output.",),
    "spec_decode_num_accepted_tokens_per_pos": (
        "Accepted tokens by their index in the draft.",
        "position",
    ),
}
"""Only with --speculative-config, as in vLLM."""
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a sequence.", _SECONDS),
    "request_time_per_output_token_seconds": ("A sequence's mean time between tokens.", _SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the end.", _SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", _SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first to the last generated token.", _SECONDS),
    "request_inference_time_seconds": ("From the first step to the end.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_prefill_kv_computed_tokens": (
        "Tokens of a prompt that were computed, not found in the prefix cache.",
        _TOKENS,
    ),
    "request_generation_tokens": ("Tokens of a choice.", _TOKENS),
    "request_max_num_generation_tokens": ("Tokens of the longest of n choices.", _TOKENS),
    "request_params_n": ("n of a request, for each of its prompts.", (1, 2, 5, 10, 20, 50, 100)),
    "request_params_max_tokens": ("max_tokens of a request, for each of its choices.", _TOKENS),
    "request_num_preemptions": ("Preemptions of a sequence.", (1, 2, 3, 4, 5, 10, 20)),
    "iteration_tokens_total": ("Prompt tokens computed and tokens generated in a step.", _TOKENS),
}
_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
)
_NOT_COUNTED = frozenset(("/metrics", "/health", "/ping", "/load", "/version"))
_NO_ROUTE = "none"


class ServerMetrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                f"nanovllm:{name}",
                help_text,
                ["model_name"],
                buckets=buckets,
                registry=self._registry,
            ).labels(model_name)
            for name, (help_text, buckets) in _HISTOGRAMS.items()
        }
        self._success = Counter(
            "nanovllm:request_success",
            "Sequences that ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "error"):
            self._success.labels(model_name, reason)
        self._http_requests = Counter(
            "http_requests",
            "HTTP requests by method, status and the path of their route.",
            ["method", "status", "handler"],
            registry=self._registry,
        )
        build = Info(
            "nanovllm:build",
            "Always 1; the labels are the versions.",
            ["model_name"],
            registry=self._registry,
        )
        versions = {"version": __version__, "python_version": platform.python_version()}
        build.labels(model_name).info(versions)
        ProcessCollector(registry=self._registry)

    def watch(self, engine: AsyncEngine) -> None:
        """Read gauges and counters from `engine` at each scrape."""
        self._registry.register(_EngineCollector(engine, self._model_name))

    def render(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def histogram(self, name: str) -> LatencyHistogram:
        """Return the upper bounds and the counts of a histogram's buckets.

        The last count is of values above the last bound.
        """
        (metric,) = self._histograms[name].collect()
        sums = [int(sample.value) for sample in metric.samples if sample.name.endswith("_bucket")]
        counts = [after - before for before, after in pairwise([0, *sums])]
        return {"bounds": list(_HISTOGRAMS[name][1]), "counts": counts}

    def count_http_request(self, method: str, status: int, handler: str) -> None:
        """Count an HTTP request; `handler` is the path of its route, never a client's text."""
        known_method = method if method in _METHODS else "other"
        self._http_requests.labels(known_method, f"{status // 100}xx", handler).inc()

    def on_step(self, stats: StepStats) -> None:
        """Feed the histograms with the statistics of a step."""
        observe = self._histograms
        num_tokens = stats.num_prompt_tokens + stats.num_generated_tokens
        if num_tokens:
            observe["iteration_tokens_total"].observe(num_tokens)
        for seconds in stats.times_to_first_token_s:
            observe["time_to_first_token_seconds"].observe(seconds)
        for seconds in stats.inter_token_latencies_s:
            observe["inter_token_latency_seconds"].observe(seconds)
        for prompt in stats.finished_prompts:
            observe["request_params_n"].observe(prompt.n)
            observe["request_max_num_generation_tokens"].observe(prompt.max_generation_tokens)
        for request in stats.finished:
            self._success.labels(self._model_name, request.finish_reason).inc()
            for name, value in _values_of(request).items():
                if value is not None:
                    observe[name].observe(value)


def _values_of(request: FinishedRequest) -> dict[str, float | None]:
    """Return a finished sequence's values by histogram; None for what it did not reach."""
    times, gaps = request.times, request.generation_tokens - 1
    arrival_s, scheduled_s, first_s = times.arrival_s, times.first_scheduled_s, times.first_token_s
    decode_s = _between(first_s, times.finished_s)
    return {
        "request_prompt_tokens": request.prompt_tokens,
        "request_generation_tokens": request.generation_tokens,
        "request_num_preemptions": request.num_preemptions,
        "request_prefill_kv_computed_tokens": request.prompt_tokens - request.prompt_tokens_cached,
        "request_params_max_tokens": request.max_tokens or None,
        "e2e_request_latency_seconds": _between(arrival_s, times.finished_s),
        "request_queue_time_seconds": _between(arrival_s, scheduled_s),
        "request_inference_time_seconds": _between(scheduled_s, times.finished_s),
        "request_prefill_time_seconds": _between(scheduled_s, first_s),
        "request_decode_time_seconds": decode_s,
        "request_time_per_output_token_seconds": (
            None if decode_s is None or gaps < 1 else decode_s / gaps
        ),
    }


def _between(begin_s: float | None, end_s: float | None) -> float | None:
    return None if begin_s is None or end_s is None else end_s - begin_s


class _EngineCollector(Collector):
    """Collects gauges and counters of the engine; none while it is not ready."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        if self._engine.state is not EngineState.READY:
            return
        stats, room = self._engine.stats(), self._engine.admission.stats()
        deferred, cached = stats.num_requests_deferred, stats.prompt_tokens_cached
        waiting = stats.num_requests_waiting
        values: dict[str, float | Mapping[str, float]] = {
            **asdict(stats),
            "num_accepted_tokens_per_pos": {
                str(index): count for index, count in enumerate(stats.num_accepted_tokens_per_pos)
            },
            "num_requests_waiting_by_reason": {
                "capacity": waiting - deferred, "deferred": deferred,
            },
            "kv_cache_usage_perc": stats.kv_cache_usage,
            "queued_requests": room.choices,
            "queued_tokens": room.tokens,
            "queued_tokens_limit": room.max_tokens or 0,
            "prompt_tokens_by_source": {
                "local_compute": stats.prompt_tokens - cached, "local_cache_hit": cached,
            },
            "request_refused": room.refused,
            "request_timeout": self._engine.timeouts,
        }  # fmt: skip
        counters = dict(_COUNTERS)
        if stats.num_accepted_tokens_per_pos:
            counters |= DRAFT_COUNTERS
            values |= {name: values[name.removeprefix("spec_decode_")] for name in DRAFT_COUNTERS}
        for family, series in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, counters)):
            for name, (about, *label) in series.items():
                metric = family(f"nanovllm:{name}", about, labels=["model_name", *label])
                value = values[name]
                by_label = value if isinstance(value, Mapping) else {"": value}
                for label_value, amount in by_label.items():
                    labels = [self._model_name, label_value]
                    metric.add_metric(labels[: 1 + len(label)], amount)
                yield metric
        yield self._cache_config(self._engine.engine)

    def _cache_config(self, engine: Engine) -> Metric:
        """The KV cache's settings as labels; `num_gpu_blocks` is vLLM's name on CPUs too."""
        labels = {
            "model_name": self._model_name,
            "block_size": str(engine.config.block_size),
            "num_gpu_blocks": str(engine.blocks.num_blocks),
            "cache_dtype": engine.config.kv_cache_dtype,
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
        }
        return InfoMetricFamily("nanovllm:cache_config", "Settings of the KV cache.", labels)


class RequestCounter:
    """Counts HTTP requests by method, status and route, also those that middleware refuses."""

    def __init__(self, routes: Iterable[BaseRoute], metrics: ServerMetrics) -> None:
        self._metrics = metrics
        known = [route for route in routes if isinstance(route, Route)]
        self._fixed_paths = {route.path for route in known if "{" not in route.path}
        self._patterns = [route for route in known if "{" in route.path]

    def __call__(self, scope: Scope, status: int) -> None:
        """Count a request whose response ends."""
        handler = self._handler(scope)
        if handler not in _NOT_COUNTED:
            self._metrics.count_http_request(scope["method"], status, handler)

    def _handler(self, scope: Scope) -> str:
        """Return the path of the route with the names of its parameters; never a client's text."""
        path: str = scope["path"]
        if path in self._fixed_paths:
            return path
        matches = (route.path for route in self._patterns if route.matches(scope)[0] != Match.NONE)
        return next(matches, _NO_ROUTE)
