"""Scheduler: single rules, tested with integers alone. test_schedules.py has random schedules."""

from collections.abc import Callable

import pytest

from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepBuilder
from nanovllm.errors import InvalidRequestError
from nanovllm.model.sampling import TokenLogprobs
from tests.support.scheduling import (
    EOS,
    answers,
    expected_output,
    make_request,
    make_scheduler,
    shares,
    step,
)


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(seqs=2)
    for i in range(5):
        scheduler.add(make_request(f"r{i}", 3))
    while scheduler.has_work:
        assert len(step(scheduler).sequences) <= 2
        assert len(scheduler.running) <= 2


def test_decodes_progress_while_a_prompt_arrives_every_step() -> None:
    scheduler = make_scheduler(blocks=1000, seqs=64, tokens=16)
    first = make_request("first", 4, new=20)
    scheduler.add(first)
    for i in range(25):
        scheduler.add(make_request(f"late{i}", 16, new=30))
        if first.state is not RequestState.FINISHED:
            step(scheduler)
    assert first.num_output_tokens == 20


def test_decodes_come_first_and_prompts_share_the_rest() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_request("decoding", 4))
    step(scheduler)
    scheduler.add(make_request("long", 40))
    scheduler.add(make_request("short", 3))
    assert shares(step(scheduler)) == {"decoding": 1, "long": 12, "short": 3}, (
        "the long prompt gets half, then what the short one left"
    )


def test_one_huge_prompt_does_not_hold_up_the_others() -> None:
    scheduler = make_scheduler(blocks=300, tokens=16)
    scheduler.add(make_request("huge", 1000))
    short = make_request("short", 5)
    scheduler.add(short)
    step(scheduler)
    assert short.num_output_tokens == 1


def test_a_lone_prompt_gets_the_whole_budget() -> None:
    scheduler = make_scheduler(tokens=16)
    scheduler.add(make_request("long", 40))
    assert [step(scheduler).num_tokens for _ in range(3)] == [16, 16, 8]


def test_admission_is_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(seqs=1)
    requests = [
        make_request("a", 3, new=1),
        make_request("b", 3, new=1, priority=-1),
        make_request("c", 3, new=1),
        make_request("d", 3, new=1, priority=-1),
    ]
    for request in requests:
        scheduler.add(request)
    served: list[str] = []
    while scheduler.has_work:
        served += shares(step(scheduler))
    assert served == ["b", "d", "a", "c"]


def test_nothing_overtakes_a_request_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4, tokens=64)
    scheduler.add(make_request("running", 16, new=8))
    step(scheduler)
    scheduler.add(make_request("large", 24, new=2))
    scheduler.add(make_request("small", 4, new=2))
    order = []
    while scheduler.has_work:
        order += [name for name in shares(step(scheduler)) if name not in order]
    assert [name for name in order if name != "running"] == ["large", "small"]


@pytest.mark.parametrize("chunks", [[8], [6, 2]], ids=["a whole block", "the rest of a block"])
def test_a_block_that_a_step_fills_reserves_no_copy(chunks: list[int]) -> None:
    scheduler = make_scheduler(blocks=4, block_size=4, tokens=chunks[0])
    scheduler.add(make_request("running", 8, new=8))
    for _ in chunks[1:]:
        step(scheduler)
    scheduler.max_num_batched_tokens = 16
    scheduler.add(make_request("waiting", 3, new=1))
    assert shares(step(scheduler)) == {"running": chunks[-1], "waiting": 3}, (
        "one block of four is enough for `waiting`, and one is left for `running`"
    )


def test_out_of_blocks_the_newest_is_preempted_and_resumes() -> None:
    scheduler = make_scheduler(blocks=6, block_size=4, tokens=32, caching=False)
    old, new = make_request("old", 7, new=12), make_request("new", 7, new=12)
    scheduler.add(old)
    scheduler.add(new)
    while scheduler.has_work:
        step(scheduler)
    assert (old.num_preemptions, scheduler.num_preemptions) == (0, new.num_preemptions)
    assert new.num_preemptions > 0
    for request in (old, new):
        assert request.tokens[7:] == expected_output(request), (
            "recomputing after preemption dropped or repeated a token"
        )


def test_lower_priority_is_preempted_before_newer() -> None:
    scheduler = make_scheduler(blocks=7, block_size=4, tokens=32, caching=False)
    low, high = make_request("low", 7, new=12, priority=5), make_request("high", 7, new=12)
    scheduler.add(low)
    step(scheduler)
    scheduler.add(high)
    while scheduler.has_work:
        step(scheduler)
    assert low.num_preemptions > 0
    assert high.num_preemptions == 0


def test_whoever_shares_a_block_that_will_not_be_filled_is_set_back_too() -> None:
    scheduler = make_scheduler(block_size=4, tokens=64)
    tokens = tuple(range(1, 14))
    first, second = make_request("first", tokens), make_request("second", tokens)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    builder = StepBuilder(0, 0)
    for sequence in plan.sequences:
        builder.put(sequence)
    cause = PreemptionCause.NO_FREE_BLOCK
    scheduler._preempt(first, builder, cause)  # noqa: SLF001 - no schedule leads here
    assert not builder.sequences
    assert builder.tokens_left == 0, "the budget is whole again"
    assert {first.state, second.state} == {RequestState.WAITING}
    scheduler.check_integrity()
    while scheduler.has_work:
        step(scheduler)
    assert first.tokens[13:] == second.tokens[13:] == expected_output(first)


def test_prompt_logprobs_are_each_reported_once_and_skip_the_cache() -> None:
    scheduler = make_scheduler(block_size=4, tokens=8)
    tokens = tuple(range(1, 22))
    scheduler.add(make_request("first", tokens, new=1))
    while scheduler.has_work:
        step(scheduler)
    request = make_request("again", tokens, new=1, prompt_logprobs=1)
    scheduler.add(request)
    reported: list[int] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        reported += [
            position
            for sequence in plan.sequences
            for position in sequence.prompt_logprob_positions
        ]
        scheduler.commit(plan, answers(plan))
    assert reported == list(range(1, 21))
    assert request.num_cached_tokens == 0


def test_max_tokens_zero_reads_the_prompt_and_ends() -> None:
    scheduler = make_scheduler(tokens=8)
    request = make_request("score", 20, new=0, prompt_logprobs=0)
    scheduler.add(request)
    reported = 0
    while scheduler.has_work:
        reported += sum(
            len(sequence.prompt_logprob_positions) for sequence in step(scheduler).sequences
        )
    assert (request.finish_reason, request.num_output_tokens, reported) == (
        FinishReason.LENGTH,
        0,
        19,
    )


@pytest.mark.parametrize("when", ["waiting", "chunk", "decoding", "preempted", "finished", "never"])
def test_abort_is_allowed_in_every_state_and_harmless_twice(when: str) -> None:
    scheduler = make_scheduler(blocks=6, block_size=4, seqs=2, tokens=8, caching=False)
    other, request = make_request("other", 7, new=12), make_request("it", 12, new=8)
    if when != "never":
        scheduler.add(other)
        scheduler.add(request)
    reached: Callable[[], bool] = {
        "waiting": lambda: True,
        "chunk": lambda: 0 < request.num_computed_tokens < 12,
        "decoding": lambda: request.is_decoding,
        "preempted": lambda: request.num_preemptions > 0 and request.state is RequestState.WAITING,
        "finished": lambda: request.state is RequestState.FINISHED,
        "never": lambda: True,
    }[when]
    for _ in range(200):
        if reached():
            break
        step(scheduler)
    assert reached()
    finished = scheduler.finish("it", FinishReason.ABORT)
    assert (finished is None) == (when in ("finished", "never"))
    assert scheduler.finish("it", FinishReason.ABORT) is None
    scheduler.check_integrity()
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.kv_cache.blocks.num_used == 0
    assert when == "never" or other.tokens[7:] == expected_output(other)


def test_a_burst_of_aborted_requests_leaves_nothing_behind() -> None:
    scheduler = make_scheduler(seqs=1)
    scheduler.add(make_request("running", 3, new=50))
    step(scheduler)
    for i in range(5000):
        scheduler.add(make_request(f"r{i}", (1, 2), new=1))
        scheduler.finish(f"r{i}", FinishReason.ABORT)
        assert scheduler.num_waiting == 0
    scheduler.check_integrity()


def test_a_failed_step_ends_its_requests_and_clears_the_cache() -> None:
    scheduler = make_scheduler(block_size=4, seqs=1, tokens=16)
    failing, waiting = (
        make_request("failing", tuple(range(1, 14))),
        make_request("waiting", tuple(range(1, 14)), new=2),
    )
    scheduler.add(failing)
    scheduler.add(waiting)
    results = scheduler.fail(scheduler.schedule())
    assert [(result.request.request_id, result.request.finish_reason) for result in results] == [
        ("failing", FinishReason.ERROR)
    ]
    scheduler.check_integrity()
    assert shares(step(scheduler)) == {"waiting": 13}, "blocks of a failed step must not be found"


@pytest.mark.parametrize("place", ["append", "finish", "free"])
@pytest.mark.parametrize("at_call", [1, 2, 3])
def test_wherever_a_commit_raises_everybody_is_told_once(
    monkeypatch: pytest.MonkeyPatch, place: str, at_call: int
) -> None:
    """Four requests of one token, each of which ends in the step."""
    scheduler = make_scheduler()
    requests = [make_request(f"r{i}", 3, new=1) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    plan = scheduler.schedule()
    owner, name = {
        "append": (Request, "append"),
        "finish": (Scheduler, "_finish"),
        "free": (BlockManager, "free"),
    }[place]
    real, calls = getattr(owner, name), 0

    def failing(self: object, *given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise LookupError("lost its place")
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        try:
            results = scheduler.commit(plan, answers(plan))
        except LookupError:
            results = scheduler.fail(plan)
    told = [result.request.request_id for result in results]
    assert sorted(told) == ["r0", "r1", "r2", "r3"]
    assert all(result.request.finish_reason is not None for result in results)
    if place == "append":
        faults = {result.request.request_id: result.cause for result in results}
        assert [name for name, fault in faults.items() if fault is not None] == [f"r{at_call - 1}"]
        scheduler.check_integrity()
    assert all(request.state is RequestState.FINISHED for request in requests)


def test_a_commit_with_too_few_results_changes_nothing() -> None:
    scheduler = make_scheduler()
    request = make_request("it", 3)
    scheduler.add(request)
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="0 updates for 1 planned"):
        scheduler.commit(plan, [])
    assert (request.num_computed_tokens, request.num_output_tokens) == (0, 0)
    assert [result.request.finish_reason for result in scheduler.fail(plan)] == [FinishReason.ERROR]


def test_an_id_that_is_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    first = make_request("same", 3)
    scheduler.add(first)
    with pytest.raises(InvalidRequestError, match="the request id 'same' is in use"):
        scheduler.add(make_request("same", 5))
    assert shares(step(scheduler)) == {"same": 3}
    scheduler.finish("same", FinishReason.ABORT)
    scheduler.add(make_request("same", 5))
    assert shares(step(scheduler)) == {"same": 5}


def test_no_token_ends_the_request_with_an_error() -> None:
    scheduler = make_scheduler()
    request = make_request("it", 3)
    scheduler.add(request)
    plan = scheduler.schedule()
    scheduler.commit(plan, [SequenceUpdate(request)])
    assert request.finish_reason is FinishReason.ERROR
    assert not scheduler.has_work


def test_min_tokens_defers_the_end_of_text() -> None:
    request = make_request("it", 3, new=9, min_tokens=2)
    for token, ended in ((EOS, False), (EOS, False), (EOS, True)):
        assert request.append([token]) == 1
        assert (request.finish_reason is FinishReason.STOP) is ended
    assert request.stop_reason is None


def test_of_several_tokens_those_after_the_last_one_are_dropped() -> None:
    scheduler = make_scheduler()
    stopping, full = make_request("stopping", 3, new=9), make_request("full", 3, new=2)
    scheduler.add(stopping)
    scheduler.add(full)
    plan = scheduler.schedule()
    logprobs = tuple(TokenLogprobs([i], [-1.0], 1) for i in range(4))
    results = [SequenceUpdate(request, (5, EOS, 6, 7), logprobs) for request in (stopping, full)]
    stopping_result, full_result = scheduler.commit(plan, results)
    assert stopping_result.token_ids == full_result.token_ids == (5, EOS)
    assert stopping_result.logprobs == full_result.logprobs == logprobs[:2]
    assert stopping.finish_reason is full.finish_reason is FinishReason.STOP
    assert stopping.tokens[3:] == full.tokens[3:] == [5, EOS]
    assert not scheduler.has_work
