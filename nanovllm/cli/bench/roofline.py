"""Fractions of the machine's limits that a run reached, by the roofline model.

- decode reads all weights once per step, and the keys and values of every earlier token per query:
  bytes against the memory bandwidth.
- prefill multiplies every token by the weights of all layers, and only sampled rows by the output
  head: operations against peak FLOPS.

Bytes and operations are the minimum that the model needs. Padding, scales and repeated reads do not
count. A model that fits in a cache can exceed the memory bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.cli.bench.report import shown
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.errors import counted
from nanovllm.model.config import ModelConfig

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_VECTOR_BYTES = 4  # float32 biases and gains


@dataclass(slots=True)
class Phase:
    """Totals of the steps of a phase.

    Attributes:
        tokens: tokens of the reported speed: prompt tokens, or decoded ones.
        computed: all computed tokens, including decoded ones in prefill steps.
        pairs: query-key pairs of attention.
        rows: rows of the output head.
        keys: keys that attention reads; the rows of a sequence read them once.
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    computed: int = 0
    pairs: int = 0
    rows: int = 0
    keys: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Return tokens per second; None without steps."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def add(self, tokens: int, stats: StepStats, pairs: int, rows: int, keys: int) -> None:
        """Add a step."""
        self.tokens += tokens
        self.seconds += stats.duration_s
        self.steps += 1
        self.computed += stats.num_tokens
        self.pairs += pairs
        self.rows += rows
        self.keys += keys


@dataclass(slots=True)
class Phases:
    """The totals of prefill and decode steps."""

    prefill: Phase = field(default_factory=Phase)
    decode: Phase = field(default_factory=Phase)

    def add(self, stats: StepStats, pairs: int = 0, rows: int = 0, keys: int = 0) -> None:
        """Add a step; `pairs`, `rows` and `keys` as in Phase."""
        if stats.num_prompt_tokens:
            self.prefill.add(stats.num_prompt_tokens, stats, pairs, rows, keys)
        else:
            self.decode.add(stats.num_decode_tokens, stats, pairs, rows, keys)

    def figures(self) -> dict[str, float | None]:
        """Return tokens per second of each phase; None without steps."""
        return {
            "prefill_tokens_per_s": self.prefill.tokens_per_s,
            "decode_tokens_per_s": self.decode.tokens_per_s,
        }


@dataclass(frozen=True, slots=True)
class Costs:
    """The minimum cost of a model in bytes and floating-point operations.

    Attributes:
        weights_bytes: weights, read in each step.
        pair_bytes: keys and values of one token, all layers.
        token_operations: operations of all layers for one token, without attention.
        pair_operations: operations of attention for one query-key pair.
        row_operations: operations of the output head for one row.
    """

    weights_bytes: int
    pair_bytes: float
    token_operations: int
    pair_operations: int
    row_operations: int

    @classmethod
    def of(cls, model: ModelConfig, kind: str, pair_bytes: float) -> "Costs":
        """Return the costs of a model with weights of type `kind`."""
        layer, head = model.block_weights, model.vocab * model.d_model
        vectors = model.layers * model.block_vectors + 2 * model.d_model
        return cls(
            weights_bytes=(model.layers * layer + head) * WEIGHT_BYTES[kind]
            + vectors * _VECTOR_BYTES,
            pair_bytes=pair_bytes,
            token_operations=2 * model.layers * layer,
            pair_operations=4 * model.layers * model.queries_width,
            row_operations=2 * head,
        )

    @classmethod
    def of_engine(cls, engine: Engine) -> "Costs":
        """Return the costs of a loaded engine's model."""
        backend, block_size = engine.runner.backend, engine.config.block_size
        pair_bytes = backend.block_bytes(block_size) / block_size
        return cls.of(engine.model, backend.weight_dtype, pair_bytes)

    def read_bytes(self, steps: int, keys: int) -> float:
        """Return the bytes that decode steps read."""
        return steps * self.weights_bytes + keys * self.pair_bytes

    def operations(self, tokens: int, pairs: int, rows: int) -> int:
        """Return the operations for these tokens, query-key pairs and rows of logits."""
        return (
            tokens * self.token_operations
            + pairs * self.pair_operations
            + rows * self.row_operations
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """The machine's limits.

    Attributes:
        threads: threads of the measurement.
        kind: type of the weights.
        bandwidth: bytes per second.
        peak: operations per second in `peak_type`; None without an instruction for it.
        peak_type: type that kernels compute in: float32 for bfloat16 weights that they widen.
    """

    threads: int
    kind: str
    bandwidth: float
    peak: float | None
    peak_type: str

    @classmethod
    def measure(cls, engine: Engine) -> "Limits":
        """Measure the limits for an engine's threads and type of weights."""
        # Numba is slow to import.
        from nanovllm.cli.bench.machine import measure_bandwidth, measure_peak, peak_type

        threads, kind = engine.runner.backend.num_threads, engine.runner.backend.weight_dtype
        peak = measure_peak(kind, threads)
        return cls(threads, kind, measure_bandwidth(threads), peak, peak_type(kind))

    def __str__(self) -> str:
        peak = (
            f"{self.peak / 1e9:,.0f} GFLOPS in {self.peak_type}"
            if self.peak
            else f"have no {self.kind} instruction whose peak could be measured"
        )
        return f"{counted(self.threads, 'thread')} read {self.bandwidth / 1e9:,.1f} GB/s, {peak}"

    @classmethod
    def mean(cls, readings: Sequence["Limits"]) -> "Limits":
        """Return the mean of measurements before and after a run."""
        peaks = [reading.peak for reading in readings if reading.peak is not None]
        bandwidth = sum(reading.bandwidth for reading in readings) / len(readings)
        return cls(
            readings[0].threads,
            readings[0].kind,
            bandwidth,
            sum(peaks) / len(peaks) if peaks else None,
            readings[0].peak_type,
        )


def fractions(costs: Costs, limits: Limits, phases: Phases) -> dict[str, float | None]:
    """Return the fraction of the limits that each phase reached; None without a measurement."""
    prefill, decode = phases.prefill, phases.decode
    read = costs.read_bytes(decode.steps, decode.keys)
    prefill_operations, decode_operations = (
        costs.operations(phase.computed, phase.pairs, phase.rows) for phase in (prefill, decode)
    )
    return {
        "prefill_peak_fraction": fraction(prefill_operations, prefill.seconds, limits.peak),
        "decode_bytes_per_step": read / decode.steps if decode.steps else None,
        "decode_bandwidth_fraction": fraction(read, decode.seconds, limits.bandwidth),
        "decode_peak_fraction": fraction(decode_operations, decode.seconds, limits.peak),
    }


def shown_fractions(reached: dict[str, float | None], limits: Limits) -> dict[str, str]:
    """Return the fractions as lines of the report; for decode, that of the nearer limit."""
    bandwidth, peak = reached["decode_bandwidth_fraction"], reached["decode_peak_fraction"]
    name = limits.kind if limits.peak is None else limits.peak_type
    is_computing = bandwidth is not None and peak is not None and peak > bandwidth
    return {
        f"prefill, of {name} peak": percent(reached["prefill_peak_fraction"]),
        f"decode, of {name} peak" if is_computing else "decode, of bandwidth": percent(
            peak if is_computing else bandwidth
        ),
    }


def fraction(amount: float, seconds: float, limit_per_s: float | None) -> float | None:
    """Return the fraction of a limit; None without a time or a limit."""
    return amount / seconds / limit_per_s if seconds and limit_per_s else None


def percent(value: float | None) -> str:
    """Format a fraction as percent; None is a dash."""
    return shown(None if value is None else 100 * value, "%", 0)
