"""Prompts that share blocks of the prefix cache, and prompts that must not."""

import pytest

from nanovllm.engine.scheduling.block_manager import hash_block, hash_salt
from tests.support.scheduling import (
    answers,
    expected_output,
    make_request,
    make_scheduler,
    shares,
    step,
)


def test_preempted_then_found_in_the_prefix_cache() -> None:
    scheduler = make_scheduler(blocks=8, block_size=4, tokens=32)
    requests = [make_request(name, 9, new=16) for name in ("a", "b")]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.num_preemptions > 0
    for request in requests:
        assert request.tokens[9:] == expected_output(request)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_a_prompt_of_whole_blocks_found_whole_still_computes_a_token(length: int) -> None:
    scheduler = make_scheduler(block_size=4, tokens=32)
    tokens = tuple(range(1, length + 1))
    scheduler.add(make_request("first", tokens, new=1))
    step(scheduler)
    again = make_request("again", tokens, new=1)
    scheduler.add(again)
    assert shares(step(scheduler)) == {"again": 4}
    assert again.num_cached_tokens == length - 4
    assert again.tokens[length:] == expected_output(again)


def test_two_identical_prompts_in_one_step_share_their_blocks() -> None:
    scheduler = make_scheduler(block_size=4, tokens=64)
    tokens = tuple(range(1, 14))
    first, second = make_request("first", tokens), make_request("second", tokens)
    scheduler.add(first)
    scheduler.add(second)
    plan = scheduler.schedule()
    assert shares(plan) == {"first": 13, "second": 1}
    assert first.block_ids[:3] == second.block_ids[:3]
    assert first.block_ids[3] != second.block_ids[3]
    assert scheduler.kv_cache.blocks.num_used == 5
    scheduler.commit(plan, answers(plan))
    scheduler.check_integrity()


def test_identical_long_prompts_read_in_chunks_compute_each_block_once() -> None:
    scheduler = make_scheduler(blocks=200, block_size=4, tokens=16)
    tokens = tuple(range(1, 202))
    requests = [make_request(name, tokens, new=1) for name in ("first", "second", "third")]
    for request in requests:
        scheduler.add(request)
    computed = 0
    while scheduler.has_work:
        computed += step(scheduler).num_tokens
    assert computed <= 201 + 2 * 8, "blocks that another request had already were computed again"


def test_prompts_with_another_salt_share_nothing() -> None:
    scheduler = make_scheduler(block_size=4, tokens=64)
    tokens = tuple(range(1, 14))
    first, second = make_request("first", tokens), make_request("second", tokens)
    second.cache_salt = "other"
    scheduler.add(first)
    scheduler.add(second)
    assert shares(step(scheduler)) == {"first": 13, "second": 13}


def test_no_salt_can_pass_for_a_block() -> None:
    """A salt that spells a known block's name must not find what follows that block."""
    tokens = tuple(range(1, 14))
    first_names = {}
    for number in range(500_000):
        victim_tokens = (number + 1, *tokens[1:])
        name = hash_block(hash_salt(""), victim_tokens[:4])
        try:
            first_names[name.decode()] = victim_tokens
            break
        except UnicodeDecodeError:
            continue
    ((salt, victim_tokens),) = first_names.items()
    scheduler = make_scheduler(block_size=4, tokens=64)
    scheduler.add(make_request("victim", victim_tokens, new=1))
    step(scheduler)
    attacker = make_request("attacker", victim_tokens[4:], new=1)
    attacker.cache_salt = salt
    scheduler.add(attacker)
    step(scheduler)
    assert attacker.num_cached_tokens == 0
