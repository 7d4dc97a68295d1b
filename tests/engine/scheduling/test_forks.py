"""n choices of one prompt: it is computed once, and every choice has the bits of a lone run."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepPlan
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import process
from tests.support.scheduling import (
    CacheModel,
    answers,
    expected_output,
    make_group,
    make_request,
    make_scheduler,
    shares,
    uncached_free_blocks,
)

KINDS: dict[str, dict[str, str]] = {
    "numpy": {"backend": "numpy"},
    "float32": {"backend": "numba"},
    "bfloat16": {"backend": "numba", "dtype": "bfloat16"},
    "int8 and cache": {"backend": "numba", "quantization": "int8", "kv_cache_dtype": "int8"},
}


class Watched:
    """A scheduler whose steps run on a model of the cache that checks every read."""

    def __init__(self, *, block_size: int = 4, **settings: int) -> None:
        self.scheduler = make_scheduler(block_size=block_size, **settings)  # type: ignore[arg-type]
        self._cache = CacheModel(block_size)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self._cache.run(plan)
        self.scheduler.commit(plan, answers(plan))
        self.scheduler.check_integrity()
        self._cache.check(self.scheduler)
        return plan

    def finish(self) -> int:
        """Work until all is done; gives the number of tokens that were computed."""
        computed = 0
        while self.scheduler.has_work:
            computed += self.step().num_tokens
        assert self.scheduler.kv_cache.blocks.num_used == 0
        return computed


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 30])
def test_a_prompt_is_computed_once_for_all_its_answers(length: int, *, caching: bool) -> None:
    watched = Watched(seqs=8, tokens=16, caching=caching)
    group = make_group("it", length, 5, new=6)
    watched.add(*group)
    assert watched.finish() == length + 5 * 5, (
        "the prompt once, and all but the last token of each answer"
    )
    assert all(request.tokens[length:] == expected_output(request) for request in group)
    assert len({tuple(request.tokens) for request in group}) == 5


def test_answers_hold_the_same_blocks_until_they_write_to_them() -> None:
    watched = Watched(block_size=4, seqs=4, tokens=16, caching=False)
    group = make_group("it", 10, 3)
    watched.add(*group)
    plan = watched.step()
    assert shares(plan) == {"it-0": 10, "it-1": 0, "it-2": 0}
    assert [request.num_output_tokens for request in group] == [1, 1, 1], (
        "all have their first token of the step that ends the prompt"
    )
    assert group[0].block_ids == group[1].block_ids == group[2].block_ids
    last = group[0].block_ids[2]
    plan = watched.step()
    copies = {target: source for source, target in plan.copies}
    tails = [request.block_ids[2] for request in group]
    assert len(set(tails)) == 3
    assert [copies.get(tail, last) for tail in tails] == [last] * 3
    assert (tails[2], len(copies)) == (last, 2), "the last of them needs no copy"
    assert not watched.step().copies


def test_a_prompt_of_whole_blocks_needs_no_copy() -> None:
    watched = Watched(block_size=4, seqs=4, tokens=16, caching=False)
    watched.add(*make_group("it", 8, 3))
    assert not any(watched.step().copies for _ in range(4))


def test_answers_that_find_no_slot_fork_later_from_one_that_runs() -> None:
    watched = Watched(block_size=4, seqs=3, tokens=16, caching=False)
    group = make_group("it", 10, 7, new=4)
    for choice, request in enumerate(group):
        request.max_new_tokens = 3 + choice  # so that they do not end together
    watched.add(*group)
    computed = watched.finish()
    assert computed == 10 + 4 + sum(2 + choice for choice in range(7)), (
        "of the prompt, each of the four computes the last token again"
    )


def test_while_a_long_prompt_is_read_its_other_answers_hold_no_blocks() -> None:
    watched = Watched(block_size=4, seqs=8, tokens=8, caching=False)
    watched.add(*make_group("it", 40, 4))
    for _ in range(4):
        assert set(shares(watched.step())) == {"it-0"}
    assert [len(request.block_ids) for request in watched.scheduler.running] == [8, 0, 0, 0]


def test_four_answers_fit_where_four_prompts_would_not() -> None:
    watched = Watched(blocks=24, block_size=4, seqs=8, tokens=64, caching=False)
    group = make_group("it", 42, 4, new=3)  # eleven blocks of prompt
    watched.add(*group)
    watched.step()
    assert (len(watched.scheduler.running), watched.scheduler.kv_cache.blocks.num_used) == (4, 11)
    watched.finish()
    assert watched.scheduler.num_preemptions == 0


@pytest.mark.parametrize("aborted", [0, 1, 2])
@pytest.mark.parametrize("after_steps", [0, 1, 2, 3, 4])
def test_any_answer_may_be_aborted_at_any_time(aborted: int, after_steps: int) -> None:
    watched = Watched(block_size=4, seqs=4, tokens=4, caching=False)
    group = make_group("it", 6, 3)
    watched.add(*group)
    for _ in range(after_steps):
        watched.step()
    watched.scheduler.finish(f"it-{aborted}", FinishReason.ABORT)
    watched.scheduler.check_integrity()
    watched.finish()
    for request in group:
        if request is not group[aborted]:
            assert request.tokens[6:] == expected_output(request)


def test_the_reader_may_be_aborted_between_plan_and_commit() -> None:
    watched = Watched(block_size=4, seqs=4, tokens=16, caching=False)
    group = make_group("it", 6, 3)
    watched.add(*group)
    plan = watched.scheduler.schedule()
    watched.scheduler.finish("it-0", FinishReason.ABORT)
    assert watched.scheduler.commit(plan, answers(plan)) == []
    watched.scheduler.check_integrity()
    watched.finish()
    assert all(request.tokens[6:] == expected_output(request) for request in group[1:])


def test_a_failed_step_ends_the_answers_that_it_was_to_begin() -> None:
    watched = Watched(seqs=4, caching=False)
    watched.add(*make_group("it", 6, 3))
    results = watched.scheduler.fail(watched.scheduler.schedule())
    assert [(result.request.request_id, result.request.finish_reason) for result in results] == [
        (f"it-{i}", FinishReason.ERROR) for i in range(3)
    ]
    assert (watched.scheduler.has_work, watched.scheduler.kv_cache.blocks.num_used) == (False, 0)


def test_requests_that_only_look_alike_are_no_group() -> None:
    watched = Watched(seqs=4, tokens=64, caching=False)
    watched.add(*(make_request(name, tuple(range(1, 11))) for name in ("a", "b")))
    assert shares(watched.step()) == {"a": 10, "b": 10}


def test_a_block_that_is_found_by_others_is_not_written_to() -> None:
    """A fork from a choice that has continued, and whose last prompt block is full and cached."""
    watched = Watched(block_size=4, seqs=1, tokens=16)
    first, second = make_group("it", 6, 2, new=5)
    watched.add(first)
    for _ in range(4):
        watched.step()
    watched.scheduler.max_num_seqs = 2
    watched.add(second)
    full = first.block_ids[1]
    plan = watched.step()
    assert plan.copies == ((full, second.block_ids[1]),)
    assert shares(plan)["it-1"] == 1
    watched.finish()
    assert second.tokens[6:] == expected_output(second)


def test_nobody_forks_from_a_copy_that_is_not_made_yet() -> None:
    """It would never be made if the one that it was for were preempted."""
    watched = Watched(block_size=4, seqs=2, tokens=16, caching=False)
    first, second, third = make_group("it", 6, 3, new=5)
    watched.add(first, second)
    watched.step()
    watched.scheduler.max_num_seqs = 3
    watched.add(third)
    plan = watched.step()
    tail = second.block_ids[1]
    assert plan.copies == ((tail, first.block_ids[1]), (tail, third.block_ids[1])), (
        "the first has a copy to come, the second writes without one"
    )
    assert watched.finish() == 2 * 3 + 4
    assert all(request.tokens[6:] == expected_output(request) for request in (first, second, third))


# --- the engine, with arrays ---


@pytest.fixture(scope="module", params=KINDS)
def config(request: pytest.FixtureRequest) -> EngineConfig:
    """Settings whose bits do not depend on the batch: all backends, types of weights and cache."""
    common = EngineConfig(
        batch_invariant=True, block_size=8, num_blocks=96, max_num_batched_tokens=64, max_num_seqs=8
    )
    return replace(common, **KINDS[request.param])  # type: ignore[arg-type]


def prompt(length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(length).integers(1, 90, length)]


def sampled(n: int, **changes: object) -> SamplingParams:
    settings: dict[str, object] = {
        "max_tokens": 10,
        "temperature": 0.9,
        "seed": 7,
        "logprobs": 2,
        "ignore_eos": True,
        "n": n,
    }
    return SamplingParams(**{**settings, **changes})  # type: ignore[arg-type]


def answer(engine: Engine, requests: Sequence[Request]) -> dict[str, list[object]]:
    """Tokens and log-probabilities; free uncached blocks are filled with NaN before every step."""
    outputs: dict[str, list[object]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        engine.runner.backend.fill_blocks(uncached_free_blocks(engine.blocks), np.nan)
        output = engine.step()
        assert output.fault is None, output.fault
        for update in output.updates:
            outputs[update.request_id] += _bits(update)
        engine.check_integrity()
    assert engine.blocks.num_used == 0
    return outputs


def _bits(update: SequenceUpdate) -> list[object]:
    return [
        *update.prompt_logprobs,
        *([(update.token_ids, update.logprobs)] if update.token_ids else []),
    ]


@pytest.fixture(scope="module")
def alone(config: EngineConfig, tiny_model: Path) -> dict[str, list[object]]:
    """What each answer is when it is computed by itself, from the first token of its prompt."""
    engine = Engine.load(tiny_model, replace(config, enable_prefix_caching=False))
    outputs: dict[str, list[object]] = {}
    for name, tokens, params in JOBS:
        for request in process(engine.input_processor, name, tokens, params).requests:
            request.parent_id = ""
            outputs |= answer(engine, [request])
    return outputs


JOBS = [
    ("one", prompt(1), sampled(4)),
    ("part", prompt(13), sampled(5, presence_penalty=0.5)),
    ("whole", prompt(16), sampled(3, top_k=20)),
    ("long", prompt(61), sampled(4, prompt_logprobs=1)),
    ("best", prompt(30), sampled(2, best_of=6, min_tokens=2)),
]


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_prefix_caching": False},
        {},
        {"max_num_batched_tokens": 9},
        {"max_num_seqs": 3, "enable_prefix_caching": False},
        {"num_blocks": 14, "enable_prefix_caching": False},
        {"num_blocks": 14, "max_num_batched_tokens": 20},
    ],
    ids=[
        "no prefix cache",
        "prefix cache",
        "chunks",
        "few slots",
        "few blocks",
        "few blocks and prefix cache",
    ],
)
def test_answers_have_the_bits_that_they_have_alone(
    config: EngineConfig, tiny_model: Path, alone: dict[str, list[object]], changes: dict[str, int]
) -> None:
    engine = Engine.load(tiny_model, replace(config, **changes))  # type: ignore[arg-type]
    requests = [
        request for job in JOBS for request in process(engine.input_processor, *job).requests
    ]
    assert answer(engine, requests) == alone
    assert ("num_blocks" in changes) == (engine.scheduler.num_preemptions > 0)


def test_more_answers_begin_in_a_step_than_it_computes_tokens(
    config: EngineConfig, tiny_model: Path
) -> None:
    """More than there is room for at first, with one token in the prompt."""
    engine = Engine.load(
        tiny_model, replace(config, max_num_seqs=128, max_num_batched_tokens=128, num_blocks=200)
    )
    requests = process(
        engine.input_processor, "many", prompt(1), sampled(100, max_tokens=2, logprobs=None)
    ).requests
    for request in requests:
        engine.add_request(request)
    assert [len(update.token_ids) == 1 for update in engine.step().updates] == [True] * 100
    while engine.has_work:
        engine.step()
    alone = answer(engine, [replace_id(requests[99])])
    assert alone["alone"] == [((token,), ()) for token in requests[99].tokens[1:]]


def replace_id(request: Request) -> Request:
    """The same request anew, and no part of its group."""
    return Request(
        request_id="alone",
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        choice_index=request.choice_index,
    )


def test_blocks_are_copied_as_they_were_before(config: EngineConfig, tiny_model: Path) -> None:
    backend = Engine.load(tiny_model, replace(config, num_blocks=4)).runner.backend
    arrays = _cache_arrays(backend)
    for array in arrays:
        array[:] = np.arange(4, dtype=np.float32).reshape(1, 4, *[1] * (array.ndim - 2))
    backend.copy_blocks([(0, 1), (1, 2), (0, 3)])
    assert len(arrays) >= 2
    for array in arrays:
        if array.size:
            held = [set(array[:, block].ravel().tolist()) for block in range(4)]
            assert held == [{0.0}, {0.0}, {1.0}, {0.0}]


def _cache_arrays(backend: object) -> list[np.ndarray]:
    memory = getattr(backend, "memory", None)
    if memory is not None:
        return [memory.arrays[name] for name in ("keys", "values", "key_scales", "value_scales")]
    cache = backend._cache  # type: ignore[attr-defined]  # noqa: SLF001 - not in the protocol
    return [cache.keys, cache.values]


def count_calls(call: Callable[[], object]) -> int:
    """Return how many functions, of Python and of C, a call enters."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("is_full", [False, True])
def test_planning_takes_a_time_that_is_proportional_to_the_choices(is_full: bool) -> None:
    """Twice the choices take at most about twice the work, in the step that takes most."""
    most = []
    for count in (32, 64, 128):
        scheduler = make_scheduler(
            blocks=2048, seqs=2 * count if is_full else 4 * count, tokens=4 * count
        )
        for prompt in range(4):
            for request in make_group(f"p{prompt}", 9, count, 3):
                scheduler.add(request)
        calls = []
        while scheduler.has_work:
            plans: list[StepPlan] = []
            calls.append(count_calls(lambda: plans.append(scheduler.schedule())))  # noqa: B023
            scheduler.commit(plans[0], answers(plans[0]))
        most.append(max(calls))
    assert most[2] < 2.3 * most[1] < 2.3**2 * most[0]
