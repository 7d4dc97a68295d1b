"""Why a request waits, and why it was preempted, as sentences with numbers.

The reasons are derived from the scheduler's state when a snapshot is made, never during a step.
They follow the rules of scheduler.py: requests are admitted in order, and the first one that does
not fit keeps back the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.engine.inspection.recorder import Preemption
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import MaskStates

_WAITS_FOR_MASK = "waits for its grammar's mask"
_IS_ADMITTED = "will be admitted in the next step"
_IS_PAUSED = "the engine is paused; "


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps the first request that the next step does not admit from running.

    Attributes:
        request: this request; None if there is none.
        reason: why it waits, without a subject.
        holds_back: whether `reason` itself explains why the later requests wait too.
        num_admitted: number of the requests before it, which the next step admits.
    """

    request: Request | None
    reason: str
    holds_back: bool = True
    num_admitted: int = 0


def find_obstacle(scheduler: Scheduler, waiting: Sequence[Request], masks: MaskStates) -> Obstacle:
    """Return the first of the waiting requests, in order, that the next step does not admit.

    The requests before it could share blocks; those are counted for each of them.
    """
    max_num_seqs, max_tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    free, reserve = scheduler.kv_cache.blocks.num_free, scheduler.num_reserved_blocks
    num_tokens = sum(_next_tokens(request, scheduler, masks) for request in scheduler.running)
    num_blocks = 0  # of the requests ahead, with one in reserve for each
    parents: set[str] = set()
    ready = [request for request in waiting if request.request_id not in masks.blocked]
    for count, request in enumerate(ready):
        users = "the running requests and those ahead" if count else "the running requests"
        if len(scheduler.running) + count >= max_num_seqs:
            return Obstacle(request, _slots_reason(max_num_seqs, count), num_admitted=count)
        is_fork = request.parent_id != "" and request.parent_id in parents
        needed = 1 if is_fork else scheduler.blocks_to_admit(request)
        if needed > free - reserve - num_blocks:
            ahead = f" and {num_blocks} are for the {count} ahead" if count else ""
            is_or_are = "is" if reserve == 1 else "are"
            reason = (
                f"needs {'up to ' if count else ''}{_blocks(needed)}; {free} can be used (free or "
                f"cached), of which {reserve} {is_or_are} reserved for running requests{ahead}"
            )
            return Obstacle(request, reason, holds_back=False, num_admitted=count)
        if num_tokens >= max_tokens:
            reason = (
                f"{users} {'can ' if count else ''}use all {max_tokens} tokens of the next step "
                f"(max_num_batched_tokens {max_tokens})"
            )
            return Obstacle(request, reason, num_admitted=count)
        num_blocks += needed + 1
        num_tokens += 0 if is_fork else _next_tokens(request, scheduler, masks)
        parents.add(request.parent_id)
    return Obstacle(None, _WAITS_FOR_MASK, holds_back=False, num_admitted=len(ready))


def waiting_reason(
    request: Request,
    position: int,
    obstacle: Obstacle,
    masks: MaskStates,
    *,
    is_paused: bool = False,
    num_later: int = 0,
) -> str:
    """Return why a waiting request waits.

    Args:
        request: the waiting request.
        position: number of waiting requests before it that do not wait for a grammar.
        obstacle: what keeps the first of the queue from running.
        masks: the masks that are missing.
        is_paused: whether the engine is paused, which is then what a request with room waits for.
        num_later: number of those requests that arrived later, but whose clients have received less
            service.
    """
    if request.request_id in masks.blocked:
        return _WAITS_FOR_MASK
    if position < obstacle.num_admitted:
        ahead = f", together with the {position} ahead of it" if position else ""
        return (_IS_PAUSED if is_paused else "") + _IS_ADMITTED + ahead
    first = obstacle.request
    assert first is not None
    if request is first and not (obstacle.holds_back and position):
        return obstacle.reason + ("; it is the next" if obstacle.holds_back else "")
    ahead = f"{position} request is ahead" if position == 1 else f"{position} requests are ahead"
    if num_later:
        have = "client has" if num_later == 1 else "clients have"
        ahead += f", {num_later} of them because the {have} received less"
    if obstacle.holds_back:
        return f"{obstacle.reason}; {ahead}"
    is_named = position == 1 or obstacle.num_admitted
    subject = first.request_id if is_named else f"the first of them, {first.request_id},"
    return f"{ahead}; {subject} {obstacle.reason}"


def running_reason(request: Request, scheduler: Scheduler, masks: MaskStates) -> str | None:
    """Return why a running request is not part of every step; None if it is."""
    if request.request_id in masks.blocked:
        return _WAITS_FOR_MASK
    if scheduler.siblings.must_wait(request):
        first = scheduler.siblings.first(request)
        return f"waits for the prompt of choice {first.choice_index} of its request"
    return None


def preemption_reason(preemption: Preemption) -> str:
    """Return why and when a request was preempted, and what it lost."""
    other = preemption.other_id
    if other == preemption.request_id:
        cause = "no block was free for it, and every other running request comes before it"
    else:
        cause = {
            PreemptionCause.NO_FREE_BLOCK: f"no block was free for {other}, which comes before it",
            PreemptionCause.UNFILLED_BLOCK: (
                f"it shared a block that {other} had not filled when that was preempted"
            ),
            PreemptionCause.FAIR_SHARE: f"{other}, whose client has received less, took its place",
            PreemptionCause.LATE_MASK: "its grammar's mask was late, and other requests waited",
            PreemptionCause.NOT_FINITE: (
                f"it shared blocks with {other}, whose output was not finite"
            ),
            PreemptionCause.FAILED_STEP: "a step failed, and the cache was reset",
        }[preemption.cause]
    tokens = preemption.num_computed_tokens
    lost = f"{tokens} computed token is" if tokens == 1 else f"{tokens} computed tokens are"
    return (
        f"preempted at step {preemption.step}: {cause}; {lost} recomputed, except those whose "
        "blocks are still cached"
    )


def _next_tokens(request: Request, scheduler: Scheduler, masks: MaskStates) -> int:
    """Return how many tokens of a running request are planned next while others wait."""
    if running_reason(request, scheduler, masks) is not None:
        return 0
    limit = 1 if request.is_decoding else max(scheduler.max_num_batched_tokens // 2, 1)
    return min(request.num_uncomputed_tokens, limit)


def _slots_reason(max_num_seqs: int, num_ahead: int) -> str:
    is_one = max_num_seqs == 1
    slots = "the only slot" if is_one else f"all {max_num_seqs} sequence slots"
    if num_ahead:
        return f"the requests ahead fill {slots} (max_num_seqs {max_num_seqs})"
    return f"{slots} {'is' if is_one else 'are'} running (max_num_seqs {max_num_seqs})"


def _blocks(count: int) -> str:
    return f"{count} block" if count == 1 else f"{count} blocks"
