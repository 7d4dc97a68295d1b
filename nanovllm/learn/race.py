"""Measure the reader's engine beside this project's, and where its time goes.

The engines take turns, round by round, so that other programs on the machine slow down all of them
alike; the median of the rounds counts. Afterwards one more round runs with every function of the
course wrapped, which gives the time inside each of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from statistics import median
from typing import Any

from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.errors import EngineFaultError
from nanovllm.learn.course import STEPS
from nanovllm.learn.parts import Parts, functions_of
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Work that the engines do: `num_prompts` prompts of `prompt_len` tokens.

    Attributes:
        name: for people.
        output_len: tokens to generate for each prompt.
        counts_prompts: count the tokens of the prompts; otherwise those that are generated.
    """

    name: str
    num_prompts: int
    prompt_len: int
    output_len: int
    counts_prompts: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens that count."""
        return self.num_prompts * (self.prompt_len if self.counts_prompts else self.output_len)


WORKLOADS = (
    Workload("prefill: a prompt of 256 tokens", 1, 256, 1, counts_prompts=True),
    Workload("decode: one sequence of 64 tokens", 1, 8, 64),
    Workload("decode: 8 sequences of 32 tokens", 8, 8, 32),
)


@dataclass(frozen=True, slots=True)
class FunctionTime:
    """Time inside a function of the course, without the functions of the course that it calls.

    Attributes:
        name: of the function or method.
        step: number of its step.
        is_readers: whether it is the reader's.
        calls, seconds: in one round of all workloads.
        share: fraction of the whole time.
    """

    name: str
    step: int
    is_readers: bool
    calls: int
    seconds: float
    share: float


def run_workload(engine: Engine, workload: Workload) -> float:
    """Return the seconds that an engine takes. Raises EngineFaultError if a request fails."""
    vocab = engine.model.vocab
    prompts = [
        [(1 + 7 * prompt + 3 * place) % vocab for place in range(workload.prompt_len)]
        for prompt in range(workload.num_prompts)
    ]
    params = SamplingParams(max_tokens=workload.output_len, temperature=0.0, ignore_eos=True)
    started_s = time.perf_counter()
    requests = engine.input_processor.process(
        GenerationRequest(prompts=prompts, params=params, request_id="race")
    )
    for _ in engine.run(requests):
        pass
    duration_s = time.perf_counter() - started_s
    for request in requests:
        if request.error is not None:
            raise EngineFaultError(str(request.error))
    return duration_s


def race(
    engines: Mapping[str, Engine],
    workloads: Sequence[Workload],
    rounds: int,
    on_run: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return the tokens a second of each engine in each workload: the median of the rounds.

    `on_run` is called after each of the (rounds + 1) * len(workloads) * len(engines) runs; the
    first round does not count.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for workload in workloads:
            for name, engine in engines.items():
                duration_s = run_workload(engine, workload)
                if number:
                    seconds.setdefault((workload.name, name), []).append(duration_s)
                on_run()
    return {
        one.name: {name: one.num_tokens / median(seconds[one.name, name]) for name in engines}
        for one in workloads
    }


def profile(engine: Engine, parts: Parts, workloads: Sequence[Workload]) -> list[FunctionTime]:
    """Return the time inside each function of the course in one round, the longest first."""
    clock = _Clock()
    with _measured(parts, clock):
        total_s = sum(run_workload(engine, workload) for workload in workloads)
    times = [
        FunctionTime(name, step, is_readers, calls, seconds, seconds / total_s)
        for (name, step, is_readers), (calls, seconds) in clock.times.items()
    ]
    return sorted(times, key=lambda one: -one.seconds)


class _Clock:
    """Adds up the time inside functions; the time of a nested call counts for that one alone."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, int, bool], tuple[int, float]] = {}
        self._inner_s = [0.0]

    def wrap(self, function: Callable[..., Any], key: tuple[str, int, bool]) -> Callable[..., Any]:
        """Return a function that measures `function`."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._inner_s.append(0.0)
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                duration_s = time.perf_counter() - started_s
                own_s = duration_s - self._inner_s.pop()
                self._inner_s[-1] += duration_s
                calls, seconds = self.times.get(key, (0, 0.0))
                self.times[key] = calls + 1, seconds + own_s

        return measured


@contextmanager
def _measured(parts: Parts, clock: _Clock) -> Iterator[None]:
    """Wrap the functions and methods of the course's modules, wherever a module has their names."""
    replaced: list[tuple[Any, str, Any]] = []
    namespaces = [*parts.modules.values(), *(step.solution for step in STEPS)]
    for step in STEPS:
        module = parts.modules.get(step.module)
        for name, plain in functions_of(step, module).items() if module is not None else ():
            owner, _, method = name.rpartition(".")
            if method.startswith("__"):
                continue
            is_readers = (owner or name) in parts.written[step.module]
            wrapper = clock.wrap(plain, (name, step.number, is_readers))
            for one in [getattr(module, owner)] if owner else namespaces:
                if vars(one).get(method) is plain:
                    replaced.append((one, method, plain))
                    setattr(one, method, wrapper)
    try:
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)
