"""GET /metrics: the engine's numbers in Prometheus's text format, under the names that dashboards for vLLM know, prefix `nanovllm:`.

Gauges and counters are read from the engine when they are asked for; histograms are fed after each step. The low buckets are finer
than vLLM's, since small models answer in milliseconds.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.metrics import EngineSnapshot, StepStats

_SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

_GAUGES: dict[str, tuple[str, Callable[[EngineSnapshot], float]]] = {
    "num_requests_running": (
        "Sequences in the running batch.",
        lambda stats: stats.num_requests_running,
    ),
    "num_requests_waiting": (
        "Sequences that wait for their turn.",
        lambda stats: stats.num_requests_waiting,
    ),
    "kv_cache_usage_perc": (
        "Share of the KV cache in use, from 0 to 1.",
        lambda stats: stats.kv_cache_usage,
    ),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineSnapshot], float]]] = {
    "prompt_tokens": ("Prompt tokens computed.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.generation_tokens),
    "num_preemptions": (
        "Sequences set back to be computed again.",
        lambda stats: stats.num_preemptions,
    ),
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        lambda stats: stats.prefix_cache_queries,
    ),
    "prefix_cache_hits": (
        "Prompt tokens found in the prefix cache.",
        lambda stats: stats.prefix_cache_hits,
    ),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a sequence.", _SECONDS),
    "request_time_per_output_token_seconds": ("A sequence's mean time between tokens.", _SECONDS),
    "e2e_request_latency_seconds": ("From arrival to the end.", _SECONDS),
    "request_queue_time_seconds": ("From arrival to the first step.", _SECONDS),
    "request_prefill_time_seconds": ("From the first step to the first token.", _SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
    "iteration_tokens_total": ("Tokens computed in a step.", _TOKENS),
}


class ServerMetrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        """All series carry the label model_name."""
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

    def watch(self, engine: AsyncEngine) -> None:
        """Read gauges and counters from `engine` whenever they are asked for."""
        self._registry.register(_EngineCollector(engine, self._model_name))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def on_step(self, stats: StepStats) -> None:
        """Feed the histograms with what a step did."""
        observe = self._histograms
        if stats.num_tokens:
            observe["iteration_tokens_total"].observe(stats.num_tokens)
        for seconds in stats.times_to_first_token_s:
            observe["time_to_first_token_seconds"].observe(seconds)
        for seconds in stats.inter_token_latencies_s:
            observe["inter_token_latency_seconds"].observe(seconds)
        for request in stats.finished:
            times = request.times
            assert times.finished_s is not None
            self._success.labels(self._model_name, request.finish_reason).inc()
            observe["e2e_request_latency_seconds"].observe(times.finished_s - times.arrival_s)
            observe["request_prompt_tokens"].observe(request.prompt_tokens)
            observe["request_generation_tokens"].observe(request.generation_tokens)
            if times.first_scheduled_s is not None:
                observe["request_queue_time_seconds"].observe(
                    times.first_scheduled_s - times.arrival_s
                )
                if times.first_token_s is not None:
                    decode_s = times.finished_s - times.first_token_s
                    observe["request_prefill_time_seconds"].observe(
                        times.first_token_s - times.first_scheduled_s
                    )
                    observe["request_decode_time_seconds"].observe(decode_s)
                    if request.generation_tokens > 1:
                        observe["request_time_per_output_token_seconds"].observe(
                            decode_s / (request.generation_tokens - 1)
                        )


class _EngineCollector(Collector):
    """Gauges and counters of the engine as it is now; none while it is not ready."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        if self._engine.state is not EngineState.READY:
            return
        stats: EngineSnapshot = self._engine.stats()
        for name, (help_text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"nanovllm:{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], value(stats))
            yield gauge
        for name, (help_text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"nanovllm:{name}", help_text, labels=["model_name"])
            counter.add_metric([self._model_name], value(stats))
            yield counter
        room = self._engine.admission_stats()
        for name, help_text, amount in (
            (
                "queued_requests",
                "Answers that are unfinished, of --max-queued-requests.",
                room.answers,
            ),
            ("queued_tokens", "Tokens that they may come to, of --max-queued-tokens.", room.tokens),
            ("queued_tokens_limit", "The most that queued_tokens may be.", room.max_tokens or 0),
        ):
            gauge = GaugeMetricFamily(f"nanovllm:{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], amount)
            yield gauge
        yield self._labelled(
            "request_refused",
            "Requests that found the queue full, by the limit that they met.",
            "limit",
            room.refused,
        )
        yield self._labelled(
            "request_timeout",
            "Requests whose time was over, by where they stood.",
            "stage",
            self._engine.timeouts,
        )

    def _labelled(self, name: str, help_text: str, label: str, counts: dict[str, int]) -> Metric:
        counter = CounterMetricFamily(f"nanovllm:{name}", help_text, labels=["model_name", label])
        for value, count in counts.items():
            counter.add_metric([self._model_name, value], count)
        return counter
