"""Measure where the time of a step goes: by operation, with the threads' waits at barriers.

Run: python benchmarks/step_profile.py --classes float32,int8 --steps 1,8,32,p512

A step decodes so many sequences with --context tokens each, or computes a prompt (p512). Each
thread notes when it begins an operation, ends its last item, and passes the barrier. The times of
the layers are added up; of several steps, the median counts. The last line of the report is JSON.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import OUR_OPTIONS
from benchmarks.options import ensure_model, finish, new_parser
from nanovllm.cli.argument_types import positive
from nanovllm.cli.bench.machine import measure_bandwidth, measure_peak
from nanovllm.cli.bench.roofline import WEIGHT_BYTES
from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.build.layout import MOMENTS
from nanovllm.model.kernels.step_record import MAX_PHASES_PER_LAYER, MAX_PHASES_PER_STEP

BLOCK_SIZE = 32
_WARM_UP = 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, "model", "classes", "rounds", rounds=9)
    parser.add_argument(
        "--steps", type=_steps, default=_steps("1,8,32,p512"), help="steps (1,8,32,p512)"
    )
    parser.add_argument(
        "--context", type=positive, default=144, help="tokens of a sequence (%(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    parsed = parse(arguments)
    model = ensure_model(parsed.model)
    results, limits = [], {}
    for kind in parsed.classes:
        options = LoadOptions(**OUR_OPTIONS[kind], num_threads=parsed.threads)
        backend = NumbaBackend.load(parsed.model, options)
        limits[kind] = {
            "bytes_per_s": measure_bandwidth(parsed.threads),
            "operations_per_s": measure_peak(kind, parsed.threads),
        }
        for name in parsed.steps:
            batch = make_batch(name, parsed.context, model, parsed.seed)
            blocks = int(batch.block_tables.max()) + 1
            backend.allocate_cache(blocks, BLOCK_SIZE)
            operations = profile(backend, batch, parsed.rounds)
            results.append({"type": kind, "step": name, "operations": operations})
        backend.close()
    finish({"benchmark": "step_profile", "limits": limits, "results": results}, parsed)
    return 0


def make_batch(name: str, context: int, model: ModelConfig, seed: int) -> ForwardBatch:
    """Return the batch of a step: a number of sequences, or p and the tokens of a prompt."""
    is_prompt, count = name.startswith("p"), int(name.lstrip("p"))
    seqs, queries = (1, count) if is_prompt else (count, 1)
    last = (count if is_prompt else context) - 1
    if last >= model.max_positions:
        raise ValueError(f"{name}: {last + 1} tokens are more than {model.max_positions}")
    blocks = last // BLOCK_SIZE + 1
    tables = np.arange(seqs * blocks, dtype=np.int64).reshape(seqs, blocks)
    positions = np.arange(last + 1 - queries, last + 1, dtype=np.int64)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    tokens = seqs * queries
    return ForwardBatch(
        token_ids=np.random.default_rng(seed).integers(model.vocab, size=tokens),
        positions=np.tile(positions, seqs),
        query_starts=np.arange(seqs + 1, dtype=np.int64) * queries,
        context_lens=np.full(seqs, last + 1, dtype=np.int64),
        block_tables=tables,
        slots=slots.ravel(),
        logit_rows=np.arange(1, seqs + 1, dtype=np.int64) * queries - 1,
    )


def profile(backend: NumbaBackend, batch: ForwardBatch, rounds: int) -> list[dict[str, Any]]:
    """Return the time and the wait of each operation of a step in seconds, in their order."""
    forward_names, greedy_names = names_of_phases(backend)
    measured: dict[str, list[tuple[float, float]]] = {}
    for number in range(_WARM_UP + rounds):
        step: dict[str, tuple[float, float]] = {}
        times = [
            np.zeros((len(names), backend.num_threads, MOMENTS), dtype=np.int64)
            for names in (forward_names, greedy_names)
        ]
        backend.time_phases(times[0])
        hidden = backend.forward(batch)
        backend.time_phases(times[1])
        backend.greedy(hidden)
        backend.time_phases(None)
        names, phases = (*forward_names, *greedy_names), np.concatenate(times)
        for name, phase in zip(names, phases, strict=True):
            taken_s, wait_s = seconds_of_phase(phase)
            before = step.get(name, (0.0, 0.0))
            step[name] = before[0] + taken_s, before[1] + wait_s
        if number >= _WARM_UP:
            for name, figures in step.items():
                measured.setdefault(name, []).append(figures)
    work = work_of(backend, batch)
    return [
        {
            "name": name,
            "seconds": statistics.median(taken_s for taken_s, _ in figures),
            "wait_s": statistics.median(wait_s for _, wait_s in figures),
            **work.get(name, {}),
        }
        for name, figures in measured.items()
    ]


def names_of_phases(backend: NumbaBackend) -> tuple[list[str], list[str]]:
    """Return the operations of `forward` and of `greedy`, as kernels/forward has them in order."""
    quantize = ["quantize"] if backend.weight_dtype == "int8" else []
    convert = ["convert"] if backend.input_dtype != "float32" else []
    layer = ["layer norm", "qkv", "store", "attention", *quantize, "out", "layer norm", "up"]
    layer += [*quantize, "down"]
    greedy = ["clear", *convert, "head", "choose"]
    assert len(layer) <= MAX_PHASES_PER_LAYER
    assert len(greedy) <= MAX_PHASES_PER_STEP
    return ["embed", *layer * backend.config.layers, "final norm"], greedy


def work_of(backend: NumbaBackend, batch: ForwardBatch) -> dict[str, dict[str, float]]:
    """Return the bytes of weights and the operations of the matmuls, all layers together."""
    config, tokens = backend.config, batch.tokens
    square, head = config.layers * config.d_model**2, config.d_model * config.vocab
    ffn = config.layers * config.d_model * config.d_ff
    sizes = {"qkv": 3 * square, "out": square, "up": ffn, "down": ffn, "head": head}
    rows = {"head": batch.logit_rows.size}
    width = WEIGHT_BYTES[backend.weight_dtype]
    return {
        name: {"bytes": size * width, "operations": 2 * size * rows.get(name, tokens)}
        for name, size in sizes.items()
    }


def seconds_of_phase(phase: np.ndarray) -> tuple[float, float]:
    """Return the seconds of a phase on thread 0, and the threads' mean wait at its barrier.

    Thread 0 is the caller's: its phases follow one another, while others may come and leave late.
    """
    began, _, left = phase[0]
    took_part = phase[phase[:, 0] > 0]
    waits = took_part[:, 2] - took_part[:, 1]
    return float(left - began) * 1e-9, float(waits.mean()) * 1e-9


def _steps(text: str) -> list[str]:
    """Parse numbers of sequences, and prompts as p and their tokens, with commas between them."""
    names = text.split(",")
    for name in names:
        positive(name.removeprefix("p"))
    return names


if __name__ == "__main__":
    sys.exit(main())
