"""Reasons name what a request waits for, with the numbers of the scheduler's rule."""

from collections.abc import Callable, Iterable

import pytest

from nanovllm.engine.inspection.recorder import StepRecorder
from nanovllm.engine.inspection.state import inspect_requests
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import MaskStates, SequenceUpdate
from tests.support.scheduling import answers, make_group, make_request, make_scheduler, step


def reasons(
    scheduler: Scheduler, recorder: StepRecorder | None = None, blocked: Iterable[str] = ()
) -> dict[str, str | None]:
    """Return the reason of each request by its id; `blocked` are those without a mask."""
    masks = MaskStates(frozenset(blocked))
    requests = inspect_requests(scheduler, recorder, masks)
    return {request.id: request.reason for request in requests}


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add(request)


def test_all_slots_are_running() -> None:
    scheduler = make_scheduler(seqs=2)
    add(scheduler, *(make_request(f"r{i}", 3) for i in range(5)))
    step(scheduler)
    slots = "waits for a slot, all 2 slots are running (max_num_seqs 2)"
    assert reasons(scheduler) == {
        "r0": None,
        "r1": None,
        "r2": slots,
        "r3": f"1 request is ahead; r2 {slots}",
        "r4": f"2 requests are ahead; the first of them, r2, {slots}",
    }


def test_too_few_blocks_are_free_and_those_behind_wait_for_the_first() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4)
    add(scheduler, make_request("r0", 9), make_request("r1", 17), make_request("r2", 2))
    step(scheduler)  # r0 has 3 blocks, and one more is reserved for it
    needs = (
        "needs 5 blocks; 5 can be used (free or cached), of which 1 is reserved for running "
        "requests"
    )
    assert reasons(scheduler) == {
        "r0": None,
        "r1": needs,
        "r2": f"1 request is ahead; r1 {needs}",
    }


def test_blocks_that_a_running_request_shares_are_not_needed() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4)
    prompt = tuple(range(1, 17))
    add(scheduler, make_request("r0", prompt, 8))
    step(scheduler)
    add(scheduler, make_request("r1", (*prompt, 99), 2))
    assert reasons(scheduler)["r1"] == "waits for the next step"
    step(scheduler)
    assert len(scheduler.running) == 2


def test_the_budget_of_the_step_is_used() -> None:
    scheduler = make_scheduler(tokens=8, blocks=64)
    add(scheduler, make_request("r0", 40), make_request("r1", 40), make_request("r2", 3))
    for _ in range(2):
        step(scheduler)
    assert reasons(scheduler)["r2"] == (
        "waits for the running requests, which used all 8 tokens of the last step "
        "(max_num_batched_tokens 8)"
    )


def test_nothing_is_in_the_way() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_request("r0", 3), make_request("r1", 3), make_request("r2", 3))
    assert list(reasons(scheduler).values()) == [
        "waits for the next step",
        "1 request is ahead; r0 waits for the next step",
        "2 requests are ahead; the first of them, r0, waits for the next step",
    ]
    step(scheduler)
    assert len(scheduler.running) == 3
    assert set(reasons(scheduler).values()) == {None}


def test_a_choice_waits_for_the_prompt_of_its_sibling() -> None:
    scheduler = make_scheduler(tokens=8)
    add(scheduler, *make_group("group", 20, 2), make_request("other", 5))
    step(scheduler)
    requests = inspect_requests(scheduler, None)
    assert (requests[1].phase, requests[1].reason) == (
        "blocked",
        "waits for the prompt of choice 0 of its request",
    )


def test_a_grammar_blocks_its_request_only() -> None:
    scheduler = make_scheduler(seqs=1)
    add(scheduler, make_request("r0", 3), make_request("masked", 3), make_request("r2", 3))
    step(scheduler)
    found = reasons(scheduler, blocked={"masked"})
    assert found["masked"] == "waits for its grammar's mask"
    assert found["r2"] == "waits for a slot, the only slot is running (max_num_seqs 1)"
    found = reasons(scheduler, blocked={"masked", "r0", "r2"})
    assert set(found.values()) == {"waits for its grammar's mask"}


def test_a_fair_order_names_the_clients_that_have_received_less() -> None:
    scheduler = make_scheduler(seqs=2, is_fair=True)
    add(scheduler, *(make_request(f"a{i}", 3, 8, client="a") for i in range(4)))
    step(scheduler)
    add(scheduler, *(make_request(f"b{i}", 3, 8, client="b") for i in range(2)))
    step(scheduler)
    slots = "waits for a slot, all 2 slots are running (max_num_seqs 2)"
    found = reasons(scheduler)
    assert found["b0"] == slots
    assert found["b1"] == f"1 request is ahead; b0 {slots}"
    assert found["a2"] == (
        "2 requests are ahead, 2 of them because the clients have received less; "
        f"the first of them, b0, {slots}"
    )
    scheduler.observer = recorder = StepRecorder(scheduler, 0)
    while "a1" not in recorder.preemptions:
        step(scheduler)
    preempted = reasons(scheduler, recorder)["a1"]
    assert preempted is not None
    assert ": b0, whose client has received less, took its place; " in preempted


def preempted_by_blocks(scheduler: Scheduler, recorder: StepRecorder) -> str:
    """Run two growing requests in a small pool until one is preempted; return its id."""
    add(scheduler, make_request("first", 8, 20), make_request("second", 8, 20))
    while not scheduler.num_preemptions:
        step(scheduler)
        recorder.num_steps += 1
    return "second"


def test_a_preempted_request_names_the_step_and_who_took_the_block() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4, caching=False)
    scheduler.observer = recorder = StepRecorder(scheduler, 0)
    preempted = preempted_by_blocks(scheduler, recorder)
    preemption = recorder.preemptions[preempted]
    reason = reasons(scheduler, recorder)[preempted]
    assert reason is not None
    began, _, now = reason.partition("; now: ")
    assert began == (
        f"preempted at step {preemption.step}: no block was free for first, which comes before "
        f"it; {preemption.num_computed_tokens} computed tokens are recomputed, except those whose "
        "blocks are still cached"
    )
    assert preemption.num_computed_tokens >= 8
    assert preemption.num_blocks >= 2
    assert now.startswith("needs ")
    phases = {request.id: request.phase for request in inspect_requests(scheduler, None)}
    assert phases[preempted] == "preempted", "also where no recorder has seen it"


def not_finite(scheduler: Scheduler) -> None:
    """Commit a step in which the output of the first request is not a number."""
    plan = scheduler.schedule()
    results = answers(plan)
    first = results[0].request
    scheduler.commit(plan, [SequenceUpdate(first, is_finite=False), *results[1:]])


def failed(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.add(make_request("late", 3))
    step(scheduler)
    scheduler.fail(plan)


@pytest.mark.parametrize(
    ("happen", "cause"),
    [
        (not_finite, "it shared blocks with group-0, whose output was not finite"),
        (failed, "a step failed, and the cache was reset"),
    ],
)
def test_other_causes_have_their_own_reason(
    happen: Callable[[Scheduler], None], cause: str
) -> None:
    scheduler = make_scheduler()
    scheduler.observer = recorder = StepRecorder(scheduler, 0)
    add(scheduler, *make_group("group", 6, 2))
    for _ in range(2):
        step(scheduler)
    happen(scheduler)
    assert any(cause in (reason or "") for reason in reasons(scheduler, recorder).values())
