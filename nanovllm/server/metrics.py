"""GET /metrics: the engine's numbers in Prometheus's text format, and counts of HTTP requests.

Names, labels and meanings are those of vLLM (v1/metrics/loggers.py), with the prefix `nanovllm:`;
HTTP requests are counted as vLLM's prometheus-fastapi-instrumentator does. The series, and those
that vLLM does not have, are listed in docs/reference/metrics.md. Gauges and counters are read from
the engine at each scrape; histograms are fed after each step. The low buckets are finer than
vLLM's, because small models answer in milliseconds.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope
from typing_extensions import TypedDict

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import EngineSnapshot, FinishedRequest, StepStats


class LatencyHistogram(TypedDict):
    """A histogram since the start, with the buckets of /metrics."""

    bounds: Annotated[list[float], Field(description="upper bounds in seconds")]
    counts: Annotated[
        list[int], Field(description="in each bucket; the last one is above the last bound")
    ]


METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Series: TypeAlias = dict[str, tuple[str, Callable[[EngineSnapshot], float]]]

_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0,
)  # fmt: skip
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

_GAUGES: _Series = {
    "num_requests_running": ("Sequences in the running batch.", lambda s: s.num_requests_running),
    "num_requests_waiting": (
        "Sequences that wait for their turn.",
        lambda s: s.num_requests_waiting,
    ),
    "kv_cache_usage_perc": (
        "Share of the KV cache in use, from 0 to 1.",
        lambda s: s.kv_cache_usage,
    ),
}
_COUNTERS: _Series = {
    "prompt_tokens": (
        "Tokens of the prompts that were read, those from the prefix cache included.",
        lambda s: s.prompt_tokens,
    ),
    "prompt_tokens_cached": (
        "Prompt tokens that were not computed: from the prefix cache, or shared by n choices.",
        lambda s: s.prompt_tokens_cached,
    ),
    "prompt_tokens_computed": (
        "Tokens that prefill computed, those of preempted sequences again.",
        lambda s: s.prompt_tokens_computed,
    ),
    "generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "num_preemptions": ("Preemptions of sequences.", lambda s: s.num_preemptions),
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_cache_queries,
    ),
    "prefix_cache_hits": (
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_cache_hits,
    ),
}
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
_Family: TypeAlias = type[CounterMetricFamily] | type[GaugeMetricFamily]

_METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE")
)
_NOT_COUNTED = frozenset(("/metrics", "/health", "/ping", "/load", "/version"))
_NO_ROUTE = "none"


class ServerMetrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        """Make all series, with the label model_name."""
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
        build = {"version": __version__, "python_version": platform.python_version()}
        Gauge(
            "nanovllm:build_info",
            "Always 1; the labels are the versions.",
            ["model_name", *build],
            registry=self._registry,
        ).labels(model_name, *build.values()).set(1)
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
            self._observe_counts(request)
            self._observe_times(request)

    def _observe_counts(self, request: FinishedRequest) -> None:
        """Feed the histograms with a finished sequence's counts."""
        observe = self._histograms
        observe["request_prompt_tokens"].observe(request.prompt_tokens)
        observe["request_generation_tokens"].observe(request.generation_tokens)
        observe["request_num_preemptions"].observe(request.num_preemptions)
        observe["request_prefill_kv_computed_tokens"].observe(
            request.prompt_tokens - request.prompt_tokens_cached
        )
        if request.max_tokens:
            observe["request_params_max_tokens"].observe(request.max_tokens)

    def _observe_times(self, request: FinishedRequest) -> None:
        """Feed the histograms with a finished sequence's times."""
        observe, times = self._histograms, request.times
        scheduled_s, first_token_s = times.first_scheduled_s, times.first_token_s
        assert times.finished_s is not None
        observe["e2e_request_latency_seconds"].observe(times.finished_s - times.arrival_s)
        if scheduled_s is None:
            return
        observe["request_queue_time_seconds"].observe(scheduled_s - times.arrival_s)
        observe["request_inference_time_seconds"].observe(times.finished_s - scheduled_s)
        if first_token_s is None:
            return
        decode_s = times.finished_s - first_token_s
        observe["request_prefill_time_seconds"].observe(first_token_s - scheduled_s)
        observe["request_decode_time_seconds"].observe(decode_s)
        if request.generation_tokens > 1:
            observe["request_time_per_output_token_seconds"].observe(
                decode_s / (request.generation_tokens - 1)
            )


class _EngineCollector(Collector):
    """Collects gauges and counters of the engine; none while it is not ready."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        if self._engine.state is not EngineState.READY:
            return
        stats = self._engine.stats()
        for name, (help_text, value) in _GAUGES.items():
            yield self._family(GaugeMetricFamily, name, help_text, value(stats))
        for name, (help_text, value) in _COUNTERS.items():
            yield self._family(CounterMetricFamily, name, help_text, value(stats))
        yield from self._by_label(stats)
        yield self._cache_config(self._engine.engine)
        yield from self._admission()

    def _by_label(self, stats: EngineSnapshot) -> Iterator[Metric]:
        deferred, cached = stats.num_requests_deferred, stats.prompt_tokens_cached
        yield self._labelled(
            GaugeMetricFamily,
            "num_requests_waiting_by_reason",
            "Sequences that wait for a seat or KV blocks (capacity), or for a grammar (deferred).",
            "reason",
            {"capacity": stats.num_requests_waiting - deferred, "deferred": deferred},
        )
        yield self._labelled(
            CounterMetricFamily,
            "prompt_tokens_by_source",
            "Prompt tokens by where their keys and values came from.",
            "source",
            {"local_compute": stats.prompt_tokens - cached, "local_cache_hit": cached},
        )

    def _cache_config(self, engine: Engine) -> Metric:
        """The KV cache's settings as labels; `num_gpu_blocks` is vLLM's name on CPUs too."""
        labels = {
            "model_name": self._model_name,
            "block_size": str(engine.config.block_size),
            "num_gpu_blocks": str(engine.blocks.num_blocks),
            "cache_dtype": engine.config.kv_cache_dtype,
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
        }
        gauge = GaugeMetricFamily(
            "nanovllm:cache_config_info", "Settings of the KV cache.", labels=list(labels)
        )
        gauge.add_metric(list(labels.values()), 1)
        return gauge

    def _admission(self) -> Iterator[Metric]:
        room = self._engine.admission.stats()
        for name, help_text, amount in (
            ("queued_requests", "Unfinished choices, of --max-queued-requests.", room.choices),
            ("queued_tokens", "Maximum total tokens of their requests.", room.tokens),
            ("queued_tokens_limit", "Maximum of queued_tokens.", room.max_tokens or 0),
        ):
            yield self._family(GaugeMetricFamily, name, help_text, amount)
        yield self._labelled(
            CounterMetricFamily,
            "request_refused",
            "Requests that found the queue full, by the limit that they met.",
            "limit",
            room.refused,
        )
        yield self._labelled(
            CounterMetricFamily,
            "request_timeout",
            "Requests that exceeded their deadline, by where they stood.",
            "stage",
            self._engine.timeouts,
        )

    def _family(self, family: _Family, name: str, help_text: str, value: float) -> Metric:
        metric = family(f"nanovllm:{name}", help_text, labels=["model_name"])
        metric.add_metric([self._model_name], value)
        return metric

    def _labelled(
        self,
        family: _Family,
        name: str,
        help_text: str,
        label: str,
        values: Mapping[str, int],
    ) -> Metric:
        metric = family(f"nanovllm:{name}", help_text, labels=["model_name", label])
        for value, count in values.items():
            metric.add_metric([self._model_name, value], count)
        return metric


class RequestCounter:
    """Counts HTTP requests by method, status and route, also those that middleware refuses."""

    def __init__(self, routes: Iterable[BaseRoute], metrics: ServerMetrics) -> None:
        """Count the requests to an application that has these routes."""
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
