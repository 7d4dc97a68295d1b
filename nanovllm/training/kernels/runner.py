"""Calls of compiled operations: on the pool of threads, at once or in a plan."""

import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.layout import MOMENTS, WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.training.kernels.library import load_operations
from nanovllm.training.kernels.plan import Block, OperationCall, Plan, Run, Trace
from nanovllm.training.kernels.records import (
    CALLS_PER_RUN,
    COMMON_FIELDS,
    DTYPES,
    MAX_PHASES,
    RECORDS,
    RUN_CALLS,
    SHAPES,
)
from nanovllm.training.network.operations import Pass

_SHARED_WORK = 500_000
"""Arithmetic operations below which one thread is faster than several."""
_MAX_PLANS = 16  # shapes of batches, in training and in evaluation
_PHASES = CALLS_PER_RUN * MAX_PHASES
_FLOAT32 = np.dtype(np.float32)

Argument = np.ndarray | float | None
Observer = Callable[[Run, float, np.ndarray], None]
"""Takes a run, its seconds, and the moments of its phases (model/kernels/build/layout.py)."""


class OperationRunner:
    """Runs compiled operations on a pool of threads; for one caller at a time.

    Attributes:
        target: what the operations are compiled for.
    """

    def __init__(self, num_threads: int, target: KernelTarget) -> None:
        """Load or compile the operations, and start the threads."""
        self.target = target
        self._library = load_operations(target)
        self._pool = ThreadPool(num_threads, self._library, phases=_PHASES)
        self._block = Block()
        self._trace: Trace | None = None
        self._observer: Observer | None = None
        self._plans: dict[Hashable, Plan] = {}  # in the order of their last use

    @property
    def threads(self) -> int:
        """Threads that compute a large operation."""
        return self._pool.threads

    def empty(self, *shape: int, dtype: np.dtype[Any] = _FLOAT32) -> np.ndarray:
        """Return an array with arbitrary contents, aligned to a cache line."""
        if self._trace is not None:
            return self._trace.empty(shape, dtype)
        words = math.prod(shape) * dtype.itemsize // WORD_BYTES
        return aligned_zeros(words).view(dtype).reshape(shape)

    def run(self, name: str, work: int, **arguments: Argument) -> None:
        """Run an operation to its end; in a traced pass, plan it instead.

        Args:
            name: name of the entry.
            work: about how many arithmetic operations it has.
            arguments: the fields of its record, without `_ptr` and `_bits`, and without the sizes
                of its arrays. None is address 0.

        Raises:
            TypeError: an array has another type than the operation reads, or is not C-contiguous.
            ValueError: arrays disagree about a size.
        """
        memory = _write_record(name, arguments)
        memory.set(job=self._pool.job, phases=self._pool.phases, threads=self.threads)
        call = OperationCall(name, work, memory)
        if self._trace is not None:
            self._trace.calls.append(call)
            return
        run = Run([call])
        with watch(self.target, name, chain(memory.all_arrays(), run.memory.all_arrays())):
            self._launch(run)

    def check(self, function: Callable[[], None]) -> None:
        """Check the inputs of an operation; `function` raises if they are wrong."""
        if self._trace is None:
            function()
        else:
            self._trace.checks.append(function)

    def result(self, function: Callable[[], float]) -> float:
        """Return a loss from what operations have computed; NaN in a traced pass."""
        if self._trace is None:
            return function()
        self._trace.results.append(function)
        return math.nan

    def run_pass(self, key: Hashable, compute: Pass, inputs: Sequence[np.ndarray]) -> float:
        """Return compute(*inputs), by a plan for this key and the shapes of the inputs."""
        if self.target.check:  # each operation is checked with its own arrays
            return compute(*inputs)
        key = (key, *((values.shape, values.dtype) for values in inputs))
        plan = self._plans.pop(key, None) or self._plan(compute, inputs)
        self._plans[key] = plan
        if len(self._plans) > _MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        return plan.run(self._launch, inputs)

    def time_runs(self, observer: Observer | None) -> None:
        """Call observer(run, seconds, times) after each run from now on, or nothing if None."""
        self._observer = observer
        shape = (_PHASES, self.threads, MOMENTS)
        self._pool.times = None if observer is None else np.zeros(shape, dtype=np.int64)

    def close(self) -> None:
        """End the helper threads, and release all plans and their networks."""
        self._plans.clear()
        self._pool.close()

    def _plan(self, compute: Pass, inputs: Sequence[np.ndarray]) -> Plan:
        """Trace a pass on inputs of these shapes."""
        inputs = [values.copy() for values in inputs]
        self._trace = trace = Trace()
        try:
            compute(*inputs)
        finally:
            self._trace = None
        return Plan(trace, inputs, self._block)

    def _launch(self, run: Run) -> None:
        times = self._pool.times
        if times is not None:
            times[:] = 0
        threads = 1
        if run.work >= _SHARED_WORK or times is not None:
            threads = self._pool.choose_threads(run.calls[0].name, run.work)
        started_s = time.perf_counter()
        self._pool.run(self._library.addresses[RUN_CALLS], run.memory.address, threads)
        if self._observer is not None and times is not None:
            self._observer(run, time.perf_counter() - started_s, times)


def _write_record(name: str, arguments: Mapping[str, Argument]) -> KernelMemory:
    """Return the record of an operation; the runner adds the fields that all records have."""
    fields, shapes = RECORDS[name].names or (), SHAPES[name]
    num_sizes = len({size for shape in shapes.values() for size in shape})
    known = len(COMMON_FIELDS) + num_sizes
    assert len(arguments) == len(fields) - known, f"{name} has other arguments"
    memory = KernelMemory(RECORDS[name], DTYPES)
    sizes: dict[str, int] = {}
    for field, value in arguments.items():
        if isinstance(value, np.ndarray):
            memory.bind(**{field: value})
            named = shapes.get(field, ())
            lengths = value.shape if len(named) > 1 else (value.size,) * len(named)
            for size, length in zip(named, lengths, strict=True):
                if sizes.setdefault(size, length) != length:
                    raise ValueError(
                        f"{field} of {name} has the shape {value.shape}, but {size} is "
                        f"{sizes[size]}"
                    )
        elif f"{field}_bits" in fields:
            memory.set(**{f"{field}_bits": int(np.float32(value).view(np.uint32))})
        else:
            memory.set(**{field: 0 if value is None else int(value)})
    memory.set(**sizes)
    return memory
