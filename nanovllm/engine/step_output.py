"""StepOutput: what a step has changed, as values that other threads may read."""

from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepPlan


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of a step; `fault` is the exception that ended its requests, if it raised one."""

    updates: tuple[SequenceUpdate, ...]
    stats: StepStats
    fault: Exception | None = None


def step_stats(plan: StepPlan, updates: Iterable[SequenceUpdate], duration_s: float) -> StepStats:
    """Return the statistics of a step that was committed."""
    decoding = [sequence for sequence in plan.sequences if sequence.is_decoding]
    ids = {sequence.request.request_id for sequence in decoding}
    return StepStats(
        plan.num_tokens,
        plan.num_tokens - sum(sequence.count for sequence in decoding),
        sum(len(update.token_ids) for update in updates if update.request_id in ids),
        duration_s,
    )
