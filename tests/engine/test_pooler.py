"""Hidden rows of embeddings: planned and handed over once, and pooled."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.pooling import Pooler
from nanovllm.engine.scheduling import batching
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.request import FinishReason, Pooling, Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import PlannedSequence, SequenceUpdate, StepPlan
from nanovllm.runner.native_model_runner import RunnerOutput
from nanovllm.sampling_params import SamplingParams


def embed_request(name: str, length: int, pooling: Pooling, *, computed: int = 0) -> Request:
    made = Request(
        request_id=name,
        prompt_token_ids=tuple(range(100, 100 + length)),
        sampling=SamplingParams(max_tokens=0),
        max_new_tokens=0,
        seed=0,
        pooling=pooling,
    )
    made.num_computed_tokens = computed
    made.block_ids = list(range(-(-length // 4)))
    return made


def test_rows_are_asked_for_where_they_are_and_cut_up_again() -> None:
    mean, last, reading = (
        embed_request("a", 9, "mean", computed=3),
        embed_request("b", 6, "last", computed=2),
        embed_request("c", 9, "last"),
    )
    mean.next_hidden = 4  # computed again after a preemption: position 3 has been handed over
    plan = StepPlan(
        tuple(
            PlannedSequence.of(request, count)
            for request, count in ((mean, 3), (last, 4), (reading, 5))
        )
    )
    batch, rows_used, _ = batching.build(plan, 4)
    assert batch.logit_rows.tolist() == [1, 2, 6]
    assert rows_used.hidden.tolist() == [0, 1, 2]
    assert rows_used.sampled.size == 0
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    parts = [
        result.hidden for result in batching.split(plan, RunnerOutput([], [], [], rows), vocab=64)
    ]
    assert [part.tolist() if isinstance(part, np.ndarray) else part for part in parts] == [
        [[0, 1], [2, 3]],
        [[4, 5]],
        None,
    ]


@settings(max_examples=100)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from(["last", "mean", None]), st.integers(0, 2)),
        min_size=1,
        max_size=10,
    ),
    blocks=st.integers(13, 24),
    tokens=st.integers(4, 24),
    caching=st.booleans(),
)
def test_every_row_is_handed_over_once_and_in_order(
    lengths: list[tuple[int, Pooling | None, int]], blocks: int, tokens: int, caching: bool
) -> None:
    """In small pools with preemptions, each hidden row is reported exactly once."""
    scheduler = Scheduler(
        KVCacheManager(BlockManager(blocks, 4, enable_prefix_caching=caching)),
        max_num_seqs=4,
        max_num_batched_tokens=tokens,
    )
    received: dict[str, list[int]] = {}
    requests = []
    for i, (length, pooling, priority) in enumerate(lengths):
        new = 0 if pooling else 6
        made = Request(
            request_id=f"r{i}",
            prompt_token_ids=tuple(range(length)),
            sampling=SamplingParams(max_tokens=new),
            max_new_tokens=new,
            seed=0,
            pooling=pooling,
            priority=priority,
        )
        requests.append(made)
        received[made.request_id] = []
    arriving = list(requests)
    while arriving or scheduler.has_work:
        if arriving:
            scheduler.add(arriving.pop())
        plan = scheduler.schedule()
        for sequence in plan.sequences:
            received[sequence.request.request_id] += sequence.hidden_positions
        scheduler.commit(
            plan,
            [
                SequenceUpdate(sequence.request, (7,) if sequence.samples else ())
                for sequence in plan.sequences
            ],
        )
        scheduler.check_integrity()
    for request in requests:
        every = range(request.num_prompt_tokens)
        assert received[request.request_id] == list(
            {"mean": every, "last": every[-1:], None: ()}[request.pooling]
        )
        assert request.finish_reason is FinishReason.LENGTH


@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_the_mean_is_the_same_bits_however_the_rows_come(seed: int, cuts: list[int]) -> None:
    rows = (np.random.default_rng(seed).normal(size=(40, 5)) * 10.0 ** np.arange(-4, 1)).astype(
        np.float32
    )
    expected = [0.0] * 5
    for row in rows.tolist():
        expected = [total + x for total, x in zip(expected, row, strict=True)]
    pooler = Pooler(normalize=False)
    for start, end in pairwise([0, *sorted(cuts), 40]):
        pooler.add(rows[start:end])
    assert pooler.embedding() == [float(np.float32(total / 40)) for total in expected]


def test_rows_may_be_overwritten_once_they_are_added() -> None:
    rows = np.array([[3.0, 4.0]], dtype=np.float32)
    pooler = Pooler(normalize=True)
    pooler.add(rows)
    rows[:] = 100.0
    assert pooler.embedding() == [float(np.float32(0.6)), float(np.float32(0.8))]


def test_nothing_has_no_direction_and_no_number_no_embedding() -> None:
    for value, expected in ((0.0, [0.0, 0.0]), (np.nan, None), (np.inf, None)):
        pooler = Pooler(normalize=True)
        pooler.add(np.full((2, 2), value, dtype=np.float32))
        assert pooler.embedding() == expected


def test_numbers_of_any_size_are_scaled() -> None:
    for size in (1e-30, 1e38):
        pooler = Pooler(normalize=True)
        pooler.add(np.array([[3 * size / 4, size]], dtype=np.float32))
        assert pooler.embedding() == pytest.approx([0.6, 0.8])
