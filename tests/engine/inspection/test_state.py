"""The copied state agrees with the scheduler and its blocks, and records replay to the same."""

import gc
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.inspection.recorder import MAX_RECORDS, StepRecord, StepRecorder
from nanovllm.engine.inspection.state import (
    CACHED,
    FIRST_OWNER,
    FREE,
    MAX_CELLS,
    MAX_REQUESTS,
    InspectedBlocks,
    inspect_blocks,
    inspect_requests,
)
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from tests.support.scheduling import (
    answers,
    make_group,
    make_request,
    make_scheduler,
    record_step,
)


def recorded(scheduler: Scheduler) -> StepRecorder:
    """Return a recorder that observes the scheduler."""
    scheduler.observer = recorder = StepRecorder(scheduler, 0)
    return recorder


def expand(blocks: InspectedBlocks) -> list[int]:
    return [value for value, length in blocks.cells for _ in range(length)]


def check_state(scheduler: Scheduler, recorder: StepRecorder | None) -> None:
    """Compare the copy with the scheduler's own data."""
    manager = scheduler.kv_cache.blocks
    running = sorted(scheduler.running, key=lambda request: request.sort_key)
    blocks = inspect_blocks(manager, running)
    assert (blocks.total, blocks.used) == (manager.num_blocks, manager.num_used)
    assert blocks.used + blocks.cached + blocks.free == blocks.total
    assert blocks.cached + blocks.free == manager.num_free
    holders = Counter(block for request in running for block in request.block_ids)
    values = expand(blocks)
    assert len(values) == blocks.total
    assert blocks.shared == sum(count > 1 for count in holders.values())
    assert values.count(FREE) == blocks.free
    assert values.count(CACHED) == blocks.cached
    requests = inspect_requests(scheduler, recorder, now_s=1.0)
    for block, value in enumerate(values):
        if value < 0:
            assert holders[block] == -value
        elif value >= FIRST_OWNER:
            assert holders[block] == 1
            assert block in running[value - FIRST_OWNER].block_ids
            assert requests[value - FIRST_OWNER].id == running[value - FIRST_OWNER].request_id
        else:
            assert block not in holders
    assert {request.id for request in requests} == scheduler.request_ids
    for request in requests:
        is_waiting = request.state == "waiting"
        assert is_waiting == (request.id not in {each.request_id for each in running})
        assert (request.reason is not None) == (is_waiting or request.phase == "blocked")
        assert (request.num_blocks > 0) <= (not is_waiting)


def replay(records: Iterable[StepRecord]) -> set[str]:
    """Return the ids of the running requests after the recorded steps."""
    running: set[str] = set()
    for record in records:
        events = record.events
        running |= set(events.admitted)
        running -= {preemption.request_id for preemption in events.preempted}
        running -= {request_id for request_id, _ in events.finished}
    return running


@settings(max_examples=40, deadline=None)
@given(
    plans=st.lists(
        st.tuples(
            st.integers(0, 20),  # step at which it arrives
            st.integers(1, 40),  # prompt tokens
            st.integers(1, 12),  # tokens to generate
            st.integers(0, 1),  # which beginning its prompt has
            st.one_of(st.none(), st.integers(0, 30)),  # step at which it is aborted
            st.sampled_from([1, 1, 3]),  # choices
        ),
        min_size=1,
        max_size=8,
    ),
    blocks=st.integers(13, 30),
    seqs=st.integers(1, 5),
    caching=st.booleans(),
)
def test_a_copy_agrees_with_the_scheduler_in_random_schedules(
    plans: list[tuple[int, int, int, int, int | None, int]], blocks: int, seqs: int, caching: bool
) -> None:
    scheduler = make_scheduler(
        blocks=blocks, block_size=4, seqs=seqs, tokens=seqs + 8, caching=caching
    )
    recorder = recorded(scheduler)
    groups: list[list[Request]] = []
    for index, (_, length, new, family, _, count) in enumerate(plans):
        tokens = tuple(
            1 + (family * 1000 + j if j < 24 else 10_000 * (index + 1) + j) for j in range(length)
        )
        groups.append(make_group(f"r{index}", tokens, count, new))
    for now in range(1000):
        for group, (arrival, _, _, _, abort_at, _) in zip(groups, plans, strict=True):
            if arrival == now:
                for request in group:
                    scheduler.add(request)
            if abort_at is not None and arrival <= now == abort_at:
                scheduler.finish(group[0].request_id, FinishReason.ABORT)
        check_state(scheduler, recorder)
        if not scheduler.has_work:
            if now > 30:
                break
            continue
        plan = record_step(scheduler, recorder)
        (record,) = recorder.last(1)
        manager = scheduler.kv_cache.blocks
        assert record.num_used_blocks == manager.num_used
        assert record.num_cached_blocks + record.num_free_blocks == manager.num_free
        assert (record.num_running, record.num_waiting) == (
            len(scheduler.running),
            scheduler.num_waiting,
        )
        assert [(each.request_id, each.start, each.num_tokens) for each in record.sequences] == [
            (each.request.request_id, each.start, each.count) for each in plan.sequences
        ]
        kinds = Counter(each.kind for each in record.sequences)
        assert kinds["decode"] == record.num_decode_tokens
        assert kinds["fork"] == sum(each.source is not None for each in plan.sequences)
        if len(recorder.last(MAX_RECORDS)) < MAX_RECORDS:
            assert replay(recorder.last(MAX_RECORDS)) == {
                request.request_id for request in scheduler.running
            }
    preempted = sum(len(record.events.preempted) for record in recorder.last(MAX_RECORDS))
    assert preempted == scheduler.num_preemptions
    assert recorder.preemptions == {}


def test_each_part_of_a_step_has_its_kind() -> None:
    scheduler = make_scheduler(tokens=8, block_size=4)
    recorder = recorded(scheduler)
    for request in make_group("group", 10, 2):
        scheduler.add(request)
    scored = make_request("scored", 3, 0)
    for _ in range(3):
        record_step(scheduler, recorder)
    scheduler.add(scored)
    record_step(scheduler, recorder)
    kinds = [
        {each.request_id: each.kind for each in record.sequences} for record in recorder.last(4)
    ]
    assert kinds == [
        {"group-0": "chunk"},
        {"group-0": "prefill", "group-1": "fork"},
        {"group-0": "decode", "group-1": "decode"},
        {"group-0": "decode", "group-1": "decode", "scored": "prefill"},
    ]


def test_records_are_the_last_ones_and_in_order() -> None:
    scheduler = make_scheduler(blocks=256)
    recorder = recorded(scheduler)
    scheduler.add(make_request("long", 3, MAX_RECORDS + 20))
    for _ in range(MAX_RECORDS + 10):
        record_step(scheduler, recorder)
    records = recorder.last(10**6)
    assert [record.step for record in records] == list(range(11, MAX_RECORDS + 11))
    assert recorder.last(3) == records[-3:]
    assert records[-1].decoding is records[-2].decoding, "a long decode shares its ids"


def test_finished_requests_are_released() -> None:
    """A recorder holds no request longer than some steps, and none after its records are read."""
    scheduler = make_scheduler()
    recorder = recorded(scheduler)

    def count_requests() -> int:
        return sum(
            type(each) is Request and each.request_id.startswith("finished-")
            for each in gc.get_objects()  # dead proxies among them have no __class__
        )

    for number in range(100):
        scheduler.add(make_request(f"finished-{number}", 3, 1))
        record_step(scheduler, recorder)
    assert count_requests() < 50
    assert len(recorder.last(MAX_RECORDS)) == 100
    assert count_requests() <= 1  # those of the last step


def test_reused_tokens_are_recorded() -> None:
    scheduler = make_scheduler(block_size=4)
    recorder = recorded(scheduler)
    prompt = tuple(range(1, 12))
    scheduler.add(make_request("first", prompt, 1))
    record_step(scheduler, recorder)
    scheduler.add(make_request("second", prompt, 1))
    record_step(scheduler, recorder)
    first, second = recorder.last(2)
    assert (first.events.admitted, first.events.cache_hits) == (("first",), ())
    assert first.events.finished == (("first", FinishReason.LENGTH),)
    assert second.events.cache_hits == (("second", 8),)


def test_a_large_pool_has_cells_of_several_blocks() -> None:
    manager = BlockManager(MAX_CELLS * 2 + 1, 4)
    request = make_request("owner", 3)
    request.block_ids = manager.allocate(3)
    other = make_request("other", 3)
    other.block_ids = manager.allocate(1)
    manager.share(request.block_ids[0])
    third = make_request("third", 3)
    third.block_ids = request.block_ids[:1]
    blocks = inspect_blocks(manager, [request, other, third])
    assert blocks.blocks_per_cell == 3
    assert blocks.cells == ((-2, 1), (FIRST_OWNER + 1, 1), (FREE, (MAX_CELLS * 2 + 1 + 2) // 3 - 2))
    assert (blocks.used, blocks.shared) == (4, 1)


def test_requests_beyond_the_limit_are_omitted_in_order() -> None:
    scheduler = make_scheduler(seqs=2, tokens=2)
    for index in range(MAX_REQUESTS + 5):
        scheduler.add(make_request(f"r{index}", 2))
    scheduler.commit(plan := scheduler.schedule(), answers(plan))
    requests = inspect_requests(scheduler, None)
    assert [request.id for request in requests] == [f"r{i}" for i in range(MAX_REQUESTS)]


@pytest.mark.parametrize("shows_prompts", [False, True])
def test_prompts_are_copied_only_on_demand(shows_prompts: bool) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("r", (7, 8)))
    (request,) = inspect_requests(scheduler, None, shows_prompts=shows_prompts)
    assert request.prompt_token_ids == ((7, 8) if shows_prompts else None)
