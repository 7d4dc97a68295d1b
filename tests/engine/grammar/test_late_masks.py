"""Late masks delay only the requests of their grammar, and change no tokens."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.engine.engine import Engine
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.step_plan import MaskStates
from nanovllm.errors import InvalidRequestError
from tests.support.grammars import AMBIGUOUS, children_of
from tests.support.processing import process
from tests.support.scheduling import (
    answers,
    expected_output,
    make_group,
    make_request,
    make_scheduler,
    step,
)
from tests.support.serving import ENGINE_SETTINGS


class LateGrammar:
    """A fake grammar whose masks arrive at random."""

    error = None

    def __init__(self, coin: random.Random) -> None:
        self.coin = coin
        self.is_ready = False
        self.is_closed = False
        self.may_be_late = coin.random() < 0.5
        self.accepted: list[int] = []

    def is_late(self, now_s: float) -> bool:
        return self.may_be_late and self.coin.random() < 0.5

    def accept(self, token_id: int) -> None:
        assert self.is_ready, "a token was drawn without a mask"
        self.accepted.append(token_id)
        self.is_ready = False

    def close(self) -> None:
        self.is_closed = True

    def flip(self) -> None:
        self.is_ready = self.is_ready or self.coin.random() < 0.4


@given(st.integers(0, 2**32), st.booleans())
def test_requests_that_wait_for_masks_are_passed_over(seed: int, caching: bool) -> None:
    coin = random.Random(seed)
    is_fair = coin.random() < 0.5
    scheduler = make_scheduler(blocks=coin.randint(12, 40), caching=caching, is_fair=is_fair)
    requests: list[Request] = []
    for i in range(6):
        prompt, new = coin.randint(1, 20), coin.randint(1, 12)
        client = coin.choice("ab")
        group = make_group(f"r{i}", prompt, coin.choice((1, 1, 3)), new, client=client)
        if len(group) == 1:
            group = [make_request(f"r{i}", prompt, new, client=client)]
        for request in group:
            if coin.random() < 0.6:
                request.grammar = LateGrammar(coin)  # type: ignore[assignment]
            requests.append(request)
            scheduler.add(request)
    grammars: list[Any] = [request.grammar for request in requests if request.grammar]
    for _ in range(3000):
        if not scheduler.has_work:
            break
        for grammar in grammars:
            grammar.flip()
        ready = [r for r in scheduler.running if r.grammar is None and r.is_decoding]
        before = {request.request_id: request.num_output_tokens for request in ready}
        plan = step(scheduler)
        planned = {sequence.request.request_id for sequence in plan.sequences}
        for request in ready:
            is_behind = request.state is RequestState.RUNNING and request.is_decoding
            assert request.request_id in planned or not is_behind or before[request.request_id] == 0
        scheduler.check_integrity()
    assert not scheduler.has_work
    for request in requests:
        assert request.tokens[request.num_prompt_tokens :] == expected_output(request)
        assert request.grammar is None or request.grammar.is_closed  # type: ignore[attr-defined]
    assert scheduler.kv_cache.blocks.num_used == 0


@pytest.mark.parametrize(("slots", "blocks"), [(2, 64), (4, 10)])
def test_late_masks_keep_no_slots_and_no_blocks_from_others(slots: int, blocks: int) -> None:
    scheduler = make_scheduler(seqs=slots, blocks=blocks)
    late = [make_request(f"late{i}", 12, 8) for i in range(2)]
    grammars = [LateGrammar(random.Random(0)) for _ in late]
    for request, grammar in zip(late, grammars, strict=True):
        grammar.is_ready, grammar.may_be_late = True, False
        request.grammar = grammar  # type: ignore[assignment]
        scheduler.add(request)
    while any(request.num_output_tokens == 0 for request in late):
        step(scheduler)
    other = make_request("other", 12, 8)
    scheduler.add(other)
    step(scheduler)
    assert other not in scheduler.running, "its slot or its blocks are taken"
    for grammar in grammars:
        grammar.may_be_late = True
        grammar.coin = SimpleNamespace(random=lambda: 0.0)  # type: ignore[assignment]
    for _ in range(20):
        step(scheduler)
        scheduler.check_integrity()
    assert other.state is RequestState.FINISHED
    for _ in range(100):
        for grammar in grammars:
            grammar.is_ready = True
        if scheduler.has_work:
            step(scheduler)
    for request in (*late, other):
        assert request.tokens[request.num_prompt_tokens :] == expected_output(request)
    assert scheduler.kv_cache.blocks.num_used == 0


class HastyGrammar(LateGrammar):
    """A fake grammar whose mask arrives, on another thread, as soon as it was looked for."""

    def __init__(self) -> None:
        self.is_closed = False
        self.accepted = []
        self._is_ready = False

    @property
    def is_ready(self) -> bool:  # type: ignore[override]
        was_ready, self._is_ready = self._is_ready, True
        return was_ready

    def is_late(self, now_s: float) -> bool:
        return False

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        self._is_ready = False


@pytest.mark.parametrize("num_others", [0, 1])
def test_a_mask_that_arrives_while_a_step_is_planned_counts_from_the_next(num_others: int) -> None:
    """A step without sequences is a normal step: nothing could run when it began."""
    scheduler = make_scheduler()
    request = make_request("masked", 6, 3)
    grammar = HastyGrammar()
    request.grammar = grammar  # type: ignore[assignment]
    others = [make_request(f"other{i}", 6, 3) for i in range(num_others)]
    for one in (request, *others):
        scheduler.add(one)
    assert len(step(scheduler).sequences) == num_others
    for _ in range(20):
        if scheduler.has_work:
            step(scheduler)
    for one in (request, *others):
        assert one.tokens[one.num_prompt_tokens :] == expected_output(one)
    assert len(grammar.accepted) == 2


def test_planning_reads_no_mask_and_no_clock() -> None:
    scheduler = make_scheduler()
    request = make_request("masked", 6, 3)
    request.grammar = object()  # type: ignore[assignment]
    scheduler.add(request)
    scheduler.add(make_request("other", 6, 3))
    missing = frozenset({"masked"})
    plan = scheduler.schedule(MaskStates(blocked=missing, late=missing))
    assert [sequence.request.request_id for sequence in plan.sequences] == ["other"]
    scheduler.commit(plan, answers(plan))
    plan = scheduler.schedule()
    assert {sequence.request.request_id for sequence in plan.sequences} == {"masked", "other"}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    made = LLM(tiny_model, **{**ENGINE_SETTINGS, "backend": "numpy"})
    yield made
    made.engine.close()


def structured(**fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=20, seed=3, structured_outputs=StructuredOutputs(**fields))


def drive(engine: Engine, *requests: Request, until: Request) -> dict[str, Any]:
    """Step until a request has finished, and return the last update of each."""
    last = {}
    end_s = time.monotonic() + 60
    while until.state is not RequestState.FINISHED:
        assert time.monotonic() < end_s
        for update in engine.step().updates:
            last[update.request_id] = update
    return last


@contextmanager
def stopped_workers() -> Iterator[None]:
    """Stop all processes that compute masks, as on an overloaded machine."""
    workers = children_of(os.getpid())
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_late_mask_delays_nobody_else(llm: LLM) -> None:
    engine = llm.engine
    params = structured(regex="[ab]{8}x")
    (expected,) = llm.generate("the", params, use_tqdm=False)
    (late,) = process(engine.input_processor, "late", "the", params).requests
    (other,) = process(
        engine.input_processor, "other", "the", SamplingParams(max_tokens=20, ignore_eos=True)
    ).requests
    with stopped_workers():
        engine.add_request(late)
        engine.add_request(other)
        drive(engine, until=other)
        assert late.num_output_tokens == 1, "its first mask is known, its second is not"
        num_steps, end_s = 0, time.monotonic() + 0.2
        while time.monotonic() < end_s:
            assert engine.step().updates == ()
            num_steps += 1
        assert num_steps < 500, "a step without work waits"
    drive(engine, until=late)
    assert late.tokens[late.num_prompt_tokens :] == expected.outputs[0].token_ids
    engine.check_integrity()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_request_whose_mask_is_late_can_be_aborted(llm: LLM) -> None:
    engine = llm.engine
    (late,) = process(engine.input_processor, "late", "the", structured(regex="[ab]{8}y")).requests
    engine.add_request(late)
    while late.num_output_tokens < 2:
        engine.step()
    with stopped_workers():
        engine.step()
        assert engine.finish_request("late", FinishReason.ABORT) is not None
        assert not engine.has_work
    (answer,) = llm.generate("the", structured(regex="[ab]{8}y"), use_tqdm=False)
    assert answer.outputs[0].text.endswith("y"), "it has another worker"


def test_a_mask_over_its_budget_ends_its_request_alone(tiny_model: Path) -> None:
    llm = LLM(tiny_model, **{**ENGINE_SETTINGS, "backend": "numpy"})
    engine = llm.engine
    limits = GrammarLimits(mask_cpu_s=0.1)
    engine.input_processor.grammars = Grammars(
        llm.tokenizer, engine.model.vocab, engine.model.eos_token_ids, limits
    )
    rules = str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "a" s\n')
    (bad,) = process(engine.input_processor, "bad", "the", structured(grammar=rules)).requests
    (good,) = process(engine.input_processor, "good", "the", structured(regex="[ab]{8}x")).requests
    (other,) = process(
        engine.input_processor, "other", "the", SamplingParams(max_tokens=20)
    ).requests
    for request in (bad, good, other):
        engine.add_request(request)
    last = {}
    while engine.has_work:
        for update in engine.step().updates:
            last[update.request_id] = update
    assert last["bad"].finish_reason is FinishReason.ERROR
    assert isinstance(last["bad"].error, InvalidRequestError)
    assert bad.num_output_tokens == 1
    assert last["good"].finish_reason is FinishReason.STOP
    assert last["other"].error is None
    engine.check_integrity()
    engine.close()


def test_a_grammar_that_is_none_ends_its_request_in_the_engine(llm: LLM) -> None:
    """Where the caller did not wait for the compilation, as in run-batch."""
    prepared = process(llm.engine.input_processor, "bad", "the", structured(regex="("))
    list(llm.engine.run([prepared]))
    assert isinstance(prepared.error, InvalidRequestError)
    assert "unclosed group" in str(prepared.error)
