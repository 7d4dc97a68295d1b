"""How close a run came to what the machine can do: what had to be read and computed, against the limits measured beside it.

    decode    reads all weights once a step, and for each query the keys and values of every token before it: bytes against bandwidth
    prefill   multiplies every token by the weights of all layers, and only rows that are sampled by the head: operations against the peak

Counted is what the network needs, whatever an implementation does: padding, scales and what is read twice are its own loss. A model that
fits a cache can be faster than memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.cli.bench.report import shown
from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.model.config import GPT2Config

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_VECTOR_BYTES = 4  # biases and gains


@dataclass(slots=True)
class Phase:
    """What some steps did together.

    Attributes:
        tokens: those that the speed is told in: of prompts, or decoded.
        computed: all of them, the decoded ones of a step that reads prompts too.
        pairs: of a query and a token that it sees, summed over queries.
        rows: those that the head was needed for.
    """

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    computed: int = 0
    pairs: int = 0
    rows: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second, None where there was nothing."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None

    def add(self, tokens: int, stats: StepStats, pairs: int, rows: int) -> None:
        """Count one step."""
        self.tokens += tokens
        self.seconds += stats.duration_s
        self.steps += 1
        self.computed += stats.num_tokens
        self.pairs += pairs
        self.rows += rows


@dataclass(frozen=True, slots=True)
class Costs:
    """What a network needs at least.

    Attributes:
        weights_bytes: read in each step.
        pair_bytes: keys and values of one token, all layers.
        token_operations: multiplications and additions of all layers for one token, but for attention.
        pair_operations: of attention, for one query and one token that it sees.
        row_operations: of the head, for one row.
    """

    weights_bytes: int
    pair_bytes: float
    token_operations: int
    pair_operations: int
    row_operations: int

    @classmethod
    def of(cls, model: GPT2Config, kind: str, pair_bytes: float) -> "Costs":
        """The costs of a model whose weights are of type `kind`."""
        layer = 4 * model.d_model**2 + 2 * model.d_model * model.d_ff
        head = model.vocab * model.d_model
        vectors = model.layers * (9 * model.d_model + model.d_ff) + 2 * model.d_model
        return cls(
            weights_bytes=(model.layers * layer + head) * WEIGHT_BYTES[kind]
            + vectors * _VECTOR_BYTES,
            pair_bytes=pair_bytes,
            token_operations=2 * model.layers * layer,
            pair_operations=4 * model.layers * model.d_model,
            row_operations=2 * head,
        )

    def read_bytes(self, steps: int, pairs: int) -> float:
        """Bytes that steps of one query a sequence read."""
        return steps * self.weights_bytes + pairs * self.pair_bytes

    def operations(self, tokens: int, pairs: int, rows: int) -> int:
        """Multiplications and additions for so many tokens, pairs and rows of logits."""
        return (
            tokens * self.token_operations
            + pairs * self.pair_operations
            + rows * self.row_operations
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do: bytes a second, and operations a second in the type of the weights, None where it has no instruction for it."""

    threads: int
    kind: str
    bandwidth: float
    peak: float | None

    @classmethod
    def measure(cls, config: EngineConfig) -> "Limits":
        """Measure this machine with the threads and the type that an engine is set to."""
        # Numba takes long to import, and only those who measure need it.
        from nanovllm.cli.bench.machine import measure_bandwidth, measure_peak  # noqa: PLC0415
        from nanovllm.model.kernels.threads.cores import default_threads  # noqa: PLC0415

        threads, kind = config.num_threads or default_threads(), weight_kind(config)
        return cls(threads, kind, measure_bandwidth(threads), measure_peak(kind, threads))

    @classmethod
    def mean(cls, readings: Sequence["Limits"]) -> "Limits":
        """The mean of readings before and after a run."""
        peaks = [reading.peak for reading in readings if reading.peak is not None]
        bandwidth = sum(reading.bandwidth for reading in readings) / len(readings)
        return cls(
            readings[0].threads,
            readings[0].kind,
            bandwidth,
            sum(peaks) / len(peaks) if peaks else None,
        )


def weight_kind(config: EngineConfig) -> str:
    """The type that the weights are kept and multiplied in."""
    return config.quantization or config.dtype


def engine_costs(engine: Engine) -> Costs:
    """The costs of a loaded engine's network; the cache's share is what its backend says."""
    block_size = engine.config.block_size
    return Costs.of(
        engine.model,
        weight_kind(engine.config),
        engine.runner.backend.block_bytes(block_size) / block_size,
    )


def fractions(
    costs: Costs, limits: Limits, prefill: Phase, decode: Phase
) -> dict[str, float | None]:
    """How much of the machine's limits each phase reached; None where there is nothing to compare."""
    read = costs.read_bytes(decode.steps, decode.pairs)
    computed = {
        phase: costs.operations(work.computed, work.pairs, work.rows)
        for phase, work in (("prefill", prefill), ("decode", decode))
    }
    return {
        "prefill_peak_fraction": _fraction(computed["prefill"], prefill.seconds, limits.peak),
        "decode_bytes_per_step": read / decode.steps if decode.steps else None,
        "decode_bandwidth_fraction": _fraction(read, decode.seconds, limits.bandwidth),
        "decode_peak_fraction": _fraction(computed["decode"], decode.seconds, limits.peak),
    }


def shown_fractions(found: dict[str, float | None], limits: Limits) -> dict[str, str]:
    """The fractions as lines of the report: of decoding, that of the limit which is nearer."""
    bandwidth, peak = found["decode_bandwidth_fraction"], found["decode_peak_fraction"]
    is_computing = bandwidth is not None and peak is not None and peak > bandwidth
    return {
        f"prefill, of {limits.kind} peak": _percent(found["prefill_peak_fraction"]),
        f"decode, of {limits.kind} peak" if is_computing else "decode, of bandwidth": _percent(
            peak if is_computing else bandwidth
        ),
    }


def shown_limits(limits: Limits) -> str:
    """The machine's limits as a line."""
    peak = (
        f"{limits.peak / 1e9:,.0f} GFLOPS in {limits.kind}"
        if limits.peak
        else f"have no {limits.kind} instruction whose peak could be measured"
    )
    return f"{limits.threads} threads read {limits.bandwidth / 1e9:,.1f} GB/s, {peak}"


def _fraction(amount: float, seconds: float, limit_per_s: float | None) -> float | None:
    return amount / seconds / limit_per_s if seconds and limit_per_s else None


def _percent(fraction: float | None) -> str:
    return shown(None if fraction is None else 100 * fraction, "%", 0)
