"""Siblings: the n choices of one prompt, which compute the prompt once.

The first of them in the order computes the prompt. The others are admitted too, wait for it, and
then fork from it.
"""

from collections.abc import Mapping, Sequence

from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence


def siblings(request: Request, running: Sequence[Request]) -> list[Request]:
    """Return the other running requests of the same prompt."""
    if not request.parent_id:
        return []
    return [
        other for other in running if other.parent_id == request.parent_id and other is not request
    ]


def waits_for_sibling(request: Request, running: Sequence[Request]) -> bool:
    """Return whether a sibling earlier in the order is still computing their prompt."""
    if not request.can_fork:
        return False
    others = siblings(request, running)
    has_read = any(other.num_computed_tokens >= request.num_prompt_tokens for other in others)
    return not has_read and any(other.sort_key < request.sort_key for other in others)


def forks(
    planned: Mapping[str, PlannedSequence], running: Sequence[Request]
) -> list[PlannedSequence]:
    """Return forks of the planned requests whose prompt is completed in this step.

    `planned` has the sequences of the step by request id.
    """
    found: dict[str, PlannedSequence] = {}
    for sequence in planned.values():
        source = sequence.request
        if source.parent_id and sequence.samples and source.num_output_tokens == 0:
            for other in siblings(source, running):
                is_fresh = other.num_output_tokens == 0 and other.request_id not in planned
                if other.can_fork and is_fresh:
                    found[other.request_id] = PlannedSequence.fork(other, source)
    return list(found.values())
