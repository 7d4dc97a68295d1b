"""Scheduler: random schedules keep all counts consistent and give every request its output."""

from collections import Counter
from typing import Any, get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.config import SchedulingPolicy
from nanovllm.engine.scheduling.request import FinishReason
from tests.support.scheduling import (
    CacheModel,
    answers,
    draft,
    expected_output,
    make_group,
    make_request,
    make_scheduler,
    shares,
    step,
)

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 30),  # step at which it arrives
        st.integers(1, 40),  # prompt tokens
        st.integers(0, 12),  # tokens to generate
        st.integers(0, 2),  # priority
        st.integers(0, 3),  # which of a few common beginnings its prompt has
        st.one_of(st.none(), st.integers(0, 40)),  # step at which it is aborted
        st.booleans(),  # whether it asks for prompt log-probabilities
        st.sampled_from(
            [1, 1, 1, 2, 3, 7]
        ),  # answers to its prompt, which is computed once for all of them
        st.integers(0, 6),  # which of them is aborted; past the last, all
        st.sampled_from("abc"),  # client
        st.tuples(st.integers(0, 6), st.integers(0, 6)),  # drafted tokens, and which is wrong
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=200, deadline=None)
@given(
    plans=REQUESTS,
    blocks=st.integers(13, 40),
    block_size=st.sampled_from([4, 8]),
    seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 20),
    caching=st.booleans(),
    policy=st.sampled_from(get_args(SchedulingPolicy)),
)
def test_random_schedules(
    plans: list[tuple[Any, ...]],
    blocks: int,
    block_size: int,
    seqs: int,
    extra_tokens: int,
    caching: bool,
    policy: str,
) -> None:
    """Random arrivals, sizes, priorities and aborts over small pools: all requests finish."""
    scheduler = make_scheduler(
        blocks=blocks,
        block_size=block_size,
        seqs=seqs,
        tokens=seqs + extra_tokens,
        caching=caching,
        is_fair=policy == "fair",
    )
    cache = CacheModel(block_size)
    groups = []
    for i, (_, length, new, priority, family, _, logprobs, count, _, client, _) in enumerate(plans):
        tokens = tuple(
            1 + (family * 1000 + j if j < 24 else 10_000 * (i + 1) + j) for j in range(length)
        )
        groups.append(
            make_group(
                f"r{i}",
                tokens,
                count,
                new,
                priority=priority if policy == "priority" else 0,
                client=client,
                prompt_logprobs=0 if logprobs else None,
            )
        )
        if count == 1 or new == 0:
            for request in groups[-1]:
                request.parent_id = ""
    reported: Counter[str] = Counter()
    decode_gap: Counter[str] = Counter()
    for now in range(2000):
        for group, (arrival, *_, abort_at, _, _, aborted, _, drafts) in zip(
            groups, plans, strict=True
        ):
            if arrival == now:
                for request in group:
                    scheduler.add(request)
            if abort_at is not None and arrival <= now == abort_at:
                for request in group if aborted >= len(group) else group[aborted : aborted + 1]:
                    scheduler.finish(request.request_id, FinishReason.ABORT)
            for request in group:
                draft(request, *drafts)
        if not scheduler.has_work:
            if now > 40:
                break
            continue
        for request in scheduler.running:
            assert request.num_registered_blocks * block_size <= request.num_computed_tokens
        plan = scheduler.schedule()
        assert 0 < plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len(plan.sequences) <= seqs
        assert len({sequence.request.request_id for sequence in plan.sequences}) == len(
            plan.sequences
        )
        for sequence in plan.sequences:
            request = sequence.request
            if sequence.source is not None:
                assert (request.num_computed_tokens, sequence.start, sequence.count) == (
                    0,
                    request.num_prompt_tokens,
                    0,
                )
                continue
            assert sequence.start == request.num_computed_tokens
            assert 0 < sequence.count <= request.num_uncomputed_tokens + len(sequence.drafted)
            assert sequence.drafted == request.drafted[: len(sequence.drafted)]
            assert len(request.block_ids) * block_size >= sequence.start + sequence.count
            reported[request.request_id] += len(sequence.prompt_logprob_positions)
        for request in scheduler.running:
            served = any(sequence.request is request for sequence in plan.sequences)
            decode_gap[request.request_id] = (
                0 if served or not request.is_decoding else decode_gap[request.request_id] + 1
            )
            assert decode_gap[request.request_id] == 0, "a decoding request was left out of a step"
        cache.run(plan)
        scheduler.commit(plan, answers(plan))
        scheduler.check_integrity()
        cache.check(scheduler)
    assert not scheduler.has_work, "some request starved"
    assert scheduler.kv_cache.blocks.num_used == 0
    for request in (request for group in groups for request in group):
        if request.finish_reason in (FinishReason.LENGTH, FinishReason.STOP):
            assert request.tokens[request.num_prompt_tokens :] == expected_output(request)
            if request.wants_prompt_logprobs:
                assert reported[request.request_id] == request.num_prompt_tokens - 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=10), blocks=st.integers(10, 20))
def test_first_come_first_admitted_within_a_priority(lengths: list[int], blocks: int) -> None:
    scheduler = make_scheduler(blocks=blocks, block_size=4, seqs=3, tokens=12, caching=False)
    for i, length in enumerate(lengths):
        scheduler.add(make_request(f"r{i}", length, new=3))
    admitted: list[str] = []
    while scheduler.has_work:
        admitted += [name for name in shares(step(scheduler)) if name not in admitted]
    assert admitted == [f"r{i}" for i in range(len(lengths))]
