"""What the threads did in a step of the engine: computed an operation, or waited at its barrier.

The compiled kernels note when a thread begins an operation, ends its last item, and passes the
barrier (kernels/build/layout.py). What thread 0, the caller's, does outside of operations counts as
Python: the scheduler, the arrays of the batch, the results, and starting the kernels' threads.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from nanovllm.cli.bench.offline import Bench, Job
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.kernels.step_record import MAX_PHASES_PER_LAYER, MAX_PHASES_PER_STEP

PYTHON = "Python"
_WARM_UP = 2  # steps

if hasattr(time, "clock_gettime_ns"):  # the clock of kernels/threads/os_wait.py

    def _now_ns() -> int:
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
else:
    _now_ns = time.perf_counter_ns


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The times of a step.

    Attributes:
        started_ns, ended_ns: times at which the engine began and ended it.
        operations: names of the operations in their order, those of each layer again.
        moments: int64 [operations, threads, MOMENTS], the nanoseconds at which a thread began an
            operation, ended its last item and passed the barrier; 0 where it came too late.
        tokens, rows: tokens that the step computed, and those of them with logits.
        keys: keys that attention reads in a layer.
    """

    started_ns: int
    ended_ns: int
    operations: tuple[str, ...]
    moments: np.ndarray
    tokens: int
    rows: int
    keys: int

    @property
    def seconds(self) -> float:
        """The duration of the step."""
        return (self.ended_ns - self.started_ns) * 1e-9

    def by_operation(self) -> dict[str, tuple[float, float]]:
        """Return the seconds of each operation, and of waiting for it; Python comes last."""
        totals: dict[str, tuple[float, float]] = {}
        for name, phase in zip(self.operations, self.moments, strict=True):
            taken_s, wait_s = seconds_of_phase(phase)
            before = totals.get(name, (0.0, 0.0))
            totals[name] = before[0] + taken_s, before[1] + wait_s
        rest_s = self.seconds - sum(taken_s for taken_s, _ in totals.values())
        return {**totals, PYTHON: (rest_s, 0.0)}

    def by_thread(self) -> list[tuple[float, float]]:
        """Return the seconds that each thread computes operations, and waits at their barriers."""
        began, ended, left = np.moveaxis(self.moments, 2, 0)
        computing = np.where(ended > 0, ended - began, 0).sum(axis=0)
        waiting = np.where(left > 0, left - ended, 0).sum(axis=0)
        return [
            (float(one) * 1e-9, float(other) * 1e-9)
            for one, other in zip(computing, waiting, strict=True)
        ]


def seconds_of_phase(phase: np.ndarray) -> tuple[float, float]:
    """Return the seconds of an operation on thread 0, and the threads' mean wait at its barrier.

    `phase` has its moments, int64 [threads, MOMENTS].
    Thread 0 is the caller's: its operations follow one another, while others may come late.
    """
    began, _, left = phase[0]
    took_part = phase[phase[:, 2] > 0]
    waits = took_part[:, 2] - took_part[:, 1]
    return float(left - began) * 1e-9, float(waits.mean()) * 1e-9


def operation_names(backend: NumbaBackend) -> dict[str, list[str]]:
    """Return the operations of `forward` and of `greedy`, as kernels/forward has them in order."""
    quantize = ["quantize"] if backend.weight_dtype == "int8" else []
    convert = ["convert"] if backend.input_dtype != "float32" else []
    layer = ["layer norm", "qkv", "store", "attention", *quantize, "out", "layer norm", "up"]
    layer += [*quantize, "down"]
    greedy = ["clear", *convert, "head", "choose"]
    assert len(layer) <= MAX_PHASES_PER_LAYER
    assert len(greedy) <= MAX_PHASES_PER_STEP
    forward = ["embed", *layer * backend.config.layers, "final norm"]
    return {"forward": forward, "greedy": greedy}


def time_steps(
    bench: Bench, jobs: Sequence[Job], count: int, *, is_prefill: bool
) -> list[StepTimes]:
    """Return the times of `count` steps, each of all `jobs`: they decode, or compute the prompts.

    The jobs run again until there are enough steps. Raises ValueError if they never all fit a step.
    """
    backend = bench.engine.runner.backend
    assert isinstance(backend, NumbaBackend), "only the compiled kernels note their times"
    recorder, steps = _Recorder(backend), list[StepTimes]()
    backend.time_runs(recorder.add_run)
    try:
        while len(steps) < _WARM_UP + count:
            missing = _WARM_UP + count - len(steps)
            found = recorder.run(bench, jobs, missing, is_prefill=is_prefill)
            if not found:
                raise ValueError(
                    f"{len(jobs)} sequences do not run in one step; lower --batch-size or "
                    "--input-len, or raise --kv-cache-memory"
                )
            steps += found
    finally:
        backend.time_runs(None)
    return steps[_WARM_UP:]


class _Recorder:
    """Keeps the times of a step's runs until the step has ended."""

    def __init__(self, backend: NumbaBackend) -> None:
        self._names = operation_names(backend)
        self._operations: list[str] = []
        self._moments: list[np.ndarray] = []

    def add_run(self, function: str, moments: np.ndarray) -> None:
        names = self._names[function]
        assert np.count_nonzero(moments[:, 0, 0]) == len(names), "a name for each operation"
        self._operations += names
        self._moments.append(moments[: len(names)].copy())

    def take(self) -> tuple[tuple[str, ...], list[np.ndarray]]:
        """Return the operations of the runs since the last call, and their moments."""
        taken = tuple(self._operations), self._moments
        self._operations, self._moments = [], []
        return taken

    def run(
        self, bench: Bench, jobs: Sequence[Job], limit: int, *, is_prefill: bool
    ) -> list[StepTimes]:
        """Run jobs and return the times of up to `limit` steps of all of them."""
        prompts = [bench.process(job) for job in jobs]
        lengths = {prompt.request_id: prompt.num_prompt_tokens for prompt in prompts}
        wanted = (sum(lengths.values()), 0) if is_prefill else (0, len(jobs))
        longest = bench.engine.max_model_len
        seen = longest if is_prefill else bench.engine.model.window or longest
        steps: list[StepTimes] = []
        with closing(bench.engine.run(prompts)) as outputs:
            started_ns = _now_ns()
            for output in outputs:
                ended_ns, stats = _now_ns(), output.stats
                names, moments = self.take()
                if (stats.num_prompt_tokens, stats.num_decode_tokens) == wanted:
                    keys = sum(min(length, seen) for length in lengths.values())
                    steps.append(
                        StepTimes(
                            started_ns, ended_ns, names, np.concatenate(moments),
                            tokens=stats.num_tokens, rows=len(jobs), keys=keys,
                        )
                    )  # fmt: skip
                if len(steps) == limit:
                    break
                for update in output.updates:
                    lengths[update.request_id] += len(update.token_ids)
                started_ns = _now_ns()
        return steps
