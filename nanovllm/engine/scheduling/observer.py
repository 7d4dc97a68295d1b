"""SchedulerObserver: receives the events of a scheduler, for an inspector.

Without an observer, which is the default, nothing is recorded. The scheduler reports admissions,
preemptions and ends when they happen; the engine reports each step once.
"""

from enum import Enum
from typing import Protocol

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import StepPlan


class PreemptionCause(Enum):
    """Why a request was preempted; `other` is the other request of `on_preempted`."""

    NO_FREE_BLOCK = "no block was free for `other`, which may be the request itself"
    UNFILLED_BLOCK = "`other` was preempted before it filled a block that both share"
    FAIR_SHARE = "the client of `other`, which waited, had received much less"
    LATE_MASK = "the mask of its grammar was late while others waited"
    NOT_FINITE = "the output of `other`, with which it shares blocks, was not finite"
    OWN_CHOICE = "a scheduler of the course, which gives no reason, took its blocks away"
    FAILED_STEP = "a step failed, so that the contents of all blocks are unknown"


class SchedulerObserver(Protocol):
    """Receives the events of one scheduler, on the thread that uses it."""

    def on_admitted(self, request: Request) -> None:
        """Receive a request that starts to run; its computed tokens are reused tokens."""

    def on_reused(self, request: Request, num_tokens: int) -> None:
        """Receive a running request that has found more tokens in computed blocks."""

    def on_preempted(self, request: Request, cause: PreemptionCause, other: Request | None) -> None:
        """Receive a request that is preempted; it still has its blocks."""

    def on_finished(self, request: Request) -> None:
        """Receive a request that has ended while it was waiting or running."""

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        """Receive the plan of a step that has been committed or has failed."""
