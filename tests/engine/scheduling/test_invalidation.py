"""Blocks of requests whose numbers were not finite are not found, held or read by others."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepPlan
from tests.support.scheduling import (
    answers,
    expected_output,
    make_group,
    make_request,
    make_scheduler,
    shares,
    step,
)

PREFIX = tuple(range(1, 9))
"""Two blocks of four tokens."""


def not_finite(request: Request) -> SequenceUpdate:
    return SequenceUpdate(request, is_finite=False)


class Lineage:
    """For each slot of the cache, who computed it and what it was computed from.

    A writer is counted anew after each of its failures, because the answers to one prompt share a
    name.
    """

    def __init__(self, block_size: int) -> None:
        self.failed: set[tuple[str, int]] = set()
        self._block_size = block_size
        self._slots: dict[tuple[int, int], frozenset[tuple[str, int]]] = {}
        self._failures: Counter[str] = Counter()

    def run(self, plan: StepPlan) -> None:
        """Do what a step does to the cache."""
        before = dict(self._slots)
        for source, target in plan.copies:
            for offset in range(self._block_size):
                self._slots[target, offset] = before.get((source, offset), frozenset())
        for sequence in (one for one in plan.sequences if one.count > 0):
            request = sequence.request
            sources = {(request.writer, self._failures[request.writer])}
            sources = sources.union(*self._read(request, sequence.start))
            for position in range(sequence.start, sequence.start + sequence.count):
                self._slots[self._place(request, position)] = frozenset(sources)

    def fail(self, writers: set[str]) -> None:
        """These writers have computed what is not finite."""
        self.failed |= {(writer, self._failures[writer]) for writer in writers}
        self._failures.update(writers)

    def check(self, scheduler: Scheduler) -> None:
        """Nothing that comes from a failed request is found or held."""
        cached = scheduler.kv_cache.blocks._block_of.values()  # noqa: SLF001
        for block in cached:
            for offset in range(self._block_size):
                assert self._slots[block, offset].isdisjoint(self.failed), "it is found"
        for request in scheduler.running:
            for sources in self._read(request, request.num_computed_tokens):
                assert sources.isdisjoint(self.failed), f"{request.request_id} has read it"

    def _read(self, request: Request, count: int) -> list[frozenset[tuple[str, int]]]:
        return [self._slots[self._place(request, position)] for position in range(count)]

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_ids[position // self._block_size], position % self._block_size


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 12),  # step at which it arrives
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 10),  # tokens to generate
        st.integers(0, 1),  # which of two common beginnings its prompt has
        st.sampled_from([1, 1, 1, 2, 3]),  # answers
        st.one_of(st.none(), st.integers(0, 9)),  # the token that cannot be drawn
        st.integers(0, 2),  # of which of the answers
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(
    plans=REQUESTS,
    blocks=st.integers(11, 40),
    seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 20),
)
@example(  # a fork copies a block that its source has found and the same step fills
    plans=[(0, 1, 1, 0, 1, None, 0), (0, 12, 2, 1, 2, 0, 0), (0, 12, 2, 1, 2, None, 0)],
    blocks=11,
    seqs=3,
    extra_tokens=1,
)
@example(  # a fork copies a block that its source has found, and whose writer fails
    plans=[(0, 1, 1, 0, 1, None, 0)] * 3 + [(0, 3, 3, 1, 3, 1, 0), (0, 3, 3, 1, 2, 1, 1)],
    blocks=11,
    seqs=4,
    extra_tokens=0,
)
def test_random_failures(
    plans: list[tuple[int, ...]], blocks: int, seqs: int, extra_tokens: int
) -> None:
    """Whichever requests fail, the others get their outputs, and no failed block is left."""
    scheduler = make_scheduler(blocks=blocks, block_size=4, seqs=seqs, tokens=seqs + extra_tokens)
    lineage = Lineage(4)
    groups, fails_at = [], {}
    for i, (_, length, new, family, count, token, choice) in enumerate(plans):
        prompt = tuple(
            1 + family * 1000 + j if j < 16 else 10_000 * (i + 1) + j for j in range(length)
        )
        groups.append(make_group(f"r{i}", prompt, count, new))
        if count == 1:
            groups[-1][0].parent_id = ""
        if token is not None and choice < count:
            fails_at[f"r{i}-{choice}"] = token
    for now in range(1000):
        for group, (arrival, *_) in zip(groups, plans, strict=True):
            if arrival == now:
                for request in group:
                    scheduler.add(request)
        if not scheduler.has_work:
            if now > 12:
                break
            continue
        plan = scheduler.schedule()
        lineage.run(plan)
        results, failed = [], set()
        for sequence, result in zip(plan.sequences, answers(plan), strict=True):
            request = sequence.request
            fails = (
                sequence.samples and fails_at.get(request.request_id) == request.num_output_tokens
            )
            failed |= {request.writer} if fails else set()
            results.append(not_finite(request) if fails else result)
        scheduler.commit(plan, results)
        lineage.fail(failed)
        scheduler.check_integrity()
        lineage.check(scheduler)
    assert not scheduler.has_work, "some request starved"
    for request in (request for group in groups for request in group):
        if fails_at.get(request.request_id, 99) < request.max_new_tokens:
            assert request.finish_reason is FinishReason.ERROR
        else:
            assert request.tokens[request.num_prompt_tokens :] == expected_output(request)


def fail_one(scheduler: Scheduler, name: str) -> None:
    """A step in which one request computes what is not finite."""
    plan = scheduler.schedule()
    results = [
        not_finite(one.request) if one.request.request_id == name else result
        for one, result in zip(plan.sequences, answers(plan), strict=True)
    ]
    scheduler.commit(plan, results)
    scheduler.check_integrity()


def test_blocks_of_a_failed_request_are_computed_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("failing", (*PREFIX, 50)))
    fail_one(scheduler, "failing")
    scheduler.add(make_request("next", (*PREFIX, 60)))
    assert shares(step(scheduler)) == {"next": 9}


def test_blocks_that_led_to_finite_numbers_before_are_kept() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("healthy", (*PREFIX, 50), new=1))
    step(scheduler)
    scheduler.add(make_request("failing", (*PREFIX, 60, 61, 62, 63, 64)))
    fail_one(scheduler, "failing")
    scheduler.add(make_request("next", (*PREFIX, 60, 61, 62, 63, 65)))
    assert shares(step(scheduler)) == {"next": 5}, "two blocks are found, and the third is not"


def test_blocks_of_an_aborted_request_are_forgotten_when_they_make_another_one_fail() -> None:
    """Its prompt was not read to its end, so nobody knew what was in them."""
    scheduler = make_scheduler(tokens=8)
    scheduler.add(make_request("aborted", (*PREFIX, 50, 51)))
    step(scheduler)
    scheduler.finish("aborted", FinishReason.ABORT)
    scheduler.add(make_request("failing", (*PREFIX, 60)))
    fail_one(scheduler, "failing")
    scheduler.add(make_request("next", (*PREFIX, 60)))
    assert shares(step(scheduler)) == {"next": 8}


def test_whoever_shares_a_block_of_a_failed_request_computes_it_again() -> None:
    scheduler = make_scheduler(tokens=32)
    first, second = make_request("failing", (*PREFIX, 50)), make_request("sharing", (*PREFIX, 60))
    scheduler.add(first)
    scheduler.add(second)
    fail_one(scheduler, "failing")
    assert (second.num_preemptions, second.num_output_tokens) == (1, 1)
    assert shares(step(scheduler)) == {"sharing": 10}
    while scheduler.has_work:
        step(scheduler)
    assert second.tokens[second.num_prompt_tokens :] == expected_output(second)


def test_a_finished_answer_that_continued_blocks_of_a_failed_request_is_not_found() -> None:
    scheduler = make_scheduler(tokens=32)
    sharing = (*PREFIX, 60, 61, 62, 63, 64)
    scheduler.add(make_request("failing", (*PREFIX, 50), new=9))
    scheduler.add(make_request("sharing", sharing, new=1))
    step(scheduler)
    fail_one(scheduler, "failing")
    scheduler.add(make_request("again", PREFIX, new=1))
    step(scheduler)  # the two blocks that all have in common are computed anew and found
    scheduler.add(make_request("next", sharing))
    assert shares(step(scheduler)) == {"next": 5}


@pytest.mark.parametrize("failing", [0, 1])
def test_answers_that_copied_a_block_of_a_failed_one_compute_it_again(failing: int) -> None:
    """The prompt is shorter than a block, so no block is shared once both have written."""
    scheduler = make_scheduler(tokens=32)
    group = make_group("answers", (1, 2, 3), 2, 6)
    for request in group:
        scheduler.add(request)
    step(scheduler)
    step(scheduler)
    assert set(group[0].block_ids).isdisjoint(group[1].block_ids)
    fail_one(scheduler, f"answers-{failing}")
    other = group[1 - failing]
    assert other.num_preemptions == 1
    while scheduler.has_work:
        step(scheduler)
    assert other.tokens[3:] == expected_output(other)
