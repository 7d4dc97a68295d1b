"""Why a request waits, and why it was preempted, as sentences with numbers.

Requests are admitted in order, and the first one that does not fit keeps back the others. So only
what the first one waits for is looked up in the scheduler, when somebody asks, never during a step.
"""

from nanovllm.engine.inspection.recorder import Preemption
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import MaskStates
from nanovllm.errors import counted

WAITS_FOR_MASK = "waits for its grammar's mask"


def first_reason(first: Request, scheduler: Scheduler, *, is_paused: bool = False) -> str:
    """Return what the first waiting request that has its mask waits for, without a subject."""
    max_num_seqs, max_tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    if len(scheduler.running) >= max_num_seqs:
        slots = "the only slot is" if max_num_seqs == 1 else f"all {max_num_seqs} slots are"
        return f"waits for a slot, {slots} running (max_num_seqs {max_num_seqs})"
    needed, reserved = scheduler.blocks_to_admit(first), scheduler.num_reserved_blocks
    free = scheduler.kv_cache.blocks.num_free
    if needed > free - reserved:
        return (
            f"needs {counted(needed, 'block')}; {free} can be used (free or "
            f"cached), of which {reserved} {'is' if reserved == 1 else 'are'} reserved for running "
            "requests"
        )
    if scheduler.has_spent_budget:
        return (
            f"waits for the running requests, which used all {max_tokens} tokens of the last step "
            f"(max_num_batched_tokens {max_tokens})"
        )
    return "waits for the next step" + (", but the engine is paused" if is_paused else "")


def later_reason(first_id: str, reason: str, num_ahead: int, num_later: int) -> str:
    """Return why a request waits that is not the first.

    Args:
        first_id: id of the first.
        reason: what that waits for.
        num_ahead: number of waiting requests before it that do not wait for a grammar.
        num_later: number of those that arrived later, but whose clients have received less service.
    """
    ahead = "1 request is ahead" if num_ahead == 1 else f"{num_ahead} requests are ahead"
    if num_later:
        have = "client has" if num_later == 1 else "clients have"
        ahead += f", {num_later} of them because the {have} received less"
    subject = first_id if num_ahead == 1 else f"the first of them, {first_id},"
    return f"{ahead}; {subject} {reason}"


def running_reason(request: Request, scheduler: Scheduler, masks: MaskStates) -> str | None:
    """Return why a running request is not part of every step; None if it is."""
    if request.request_id in masks.blocked:
        return WAITS_FOR_MASK
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
            PreemptionCause.OWN_CHOICE: "the reader's scheduler took its blocks away",
            PreemptionCause.FAILED_STEP: "a step failed, and the cache was reset",
        }[preemption.cause]
    tokens = preemption.num_computed_tokens
    lost = f"{tokens} computed token is" if tokens == 1 else f"{tokens} computed tokens are"
    return (
        f"preempted at step {preemption.step}: {cause}; {lost} recomputed, except those whose "
        "blocks are still cached"
    )
