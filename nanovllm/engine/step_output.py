"""StepOutput: what a step has changed, as values that other threads may read."""

from dataclasses import dataclass

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.step_plan import SequenceUpdate


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of a step; `fault` is the exception that ended its requests, if it raised one."""

    updates: tuple[SequenceUpdate, ...]
    stats: StepStats
    fault: Exception | None = None
