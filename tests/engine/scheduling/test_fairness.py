"""Fair shares: service is bounded by every other client's, and nobody waits longer than that."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.fairness import (
    MAX_IDLE_CLIENTS,
    OUTPUT_COST,
    PROMPT_COST,
    cost_of,
)
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestState
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import MaskStates, StepPlan
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import process
from tests.support.scheduling import (
    answers,
    draft,
    expected_output,
    make_group,
    make_request,
    make_scheduler,
    step,
)

SHAPES = st.tuples(
    st.integers(1, 24),  # prompt tokens
    st.integers(1, 12),  # tokens to generate
    st.sampled_from([1, 1, 1, 3]),  # choices
    st.booleans(),  # whether it asks for prompt log-probabilities
)


@dataclass
class Ledger:
    """Counts the service of each client on its own: every position and token once."""

    scheduler: Scheduler
    service: Counter[str] = field(default_factory=Counter)
    debts: Counter[str] = field(default_factory=Counter)
    positions: dict[str, int] = field(default_factory=dict)
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.scheduler.observer = self

    def on_admitted(self, request: Request) -> None:
        """Positions that are found are not computed."""
        known = self.positions.get(request.request_id, 0)
        self.positions[request.request_id] = max(known, request.num_computed_tokens)

    def on_reused(self, request: Request, num_tokens: int) -> None:
        self.on_admitted(request)

    def on_preempted(self, request: Request, cause: PreemptionCause, other: Request | None) -> None:
        if cause is PreemptionCause.FAIR_SHARE:
            assert other is not None
            assert other.client != request.client
            self.debts[other.client] += PROMPT_COST * request.num_computed_tokens
            self.preemptions += 1

    def on_finished(self, request: Request) -> None:
        pass

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        pass

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for sequence in plan.sequences:
            request = sequence.request
            end = sequence.start + sequence.count
            known = self.positions.get(request.request_id, 0)
            if sequence.source is None:
                new = range(max(known, sequence.start), min(end, request.num_prompt_tokens))
                self.service[request.client] += PROMPT_COST * len(new)
                self.positions[request.request_id] = max(known, end)
            else:
                self.positions[request.request_id] = max(known, request.num_prompt_tokens)
            self.service[request.client] += OUTPUT_COST * sequence.samples
            self.service[request.client] += len(sequence.prompt_logprob_positions)
        self.scheduler.commit(plan, answers(plan))
        self.scheduler.check_integrity()
        return plan


def whole_cost(prompt: int, new: int) -> int:
    """The largest cost of a request, with log-probabilities."""
    return 2 * PROMPT_COST * prompt + OUTPUT_COST * new


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=2, max_size=4),
    joins=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    blocks=st.integers(13, 60),
    seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 30),
    caching=st.booleans(),
)
def test_clients_that_always_wait_get_the_same_service(
    shapes: list[tuple[int, int, int, bool]],
    joins: list[int],
    blocks: int,
    seqs: int,
    extra_tokens: int,
    caching: bool,
) -> None:
    """See the bound of fairness.py. Beside it, nothing is computed twice for too little."""
    scheduler = make_scheduler(
        blocks=blocks, seqs=seqs, tokens=seqs + extra_tokens, caching=caching, is_fair=True
    )
    ledger = Ledger(scheduler)
    names = [f"client{i}" for i in range(len(shapes))]
    limit = (seqs + 1) * max(whole_cost(prompt, new) for prompt, new, _, _ in shapes)
    made: Counter[str] = Counter()
    base: dict[str, int] = {}
    for now in range(80):
        for name, (prompt, new, count, logprobs), join in zip(
            names, shapes, [0, *joins], strict=False
        ):
            while now >= join and not has_waiting(scheduler, name, 2 * seqs):
                made[name] += 1
                wanted = {"client": name, "prompt_logprobs": 0 if logprobs else None}
                for request in make_group(f"{name}-{made[name]}", prompt, count, new, **wanted):
                    request.parent_id *= count > 1
                    scheduler.add(request)
        ledger.step()
        waiting = {r.client: r for r in scheduler.requests if r.state is RequestState.WAITING}
        counters = {name: scheduler.queues.counter(request) for name, request in waiting.items()}
        for name, counter in counters.items():
            received = ledger.service[name] + ledger.debts[name]
            base.setdefault(name, counter - received)
            assert counter == base[name] + received, "what was computed is counted once"
        assert max(counters.values()) - min(counters.values()) <= limit
    assert ledger.debts.total() <= ledger.service.total()


def has_waiting(scheduler: Scheduler, client: str, count: int) -> bool:
    """Return whether a client has `count` waiting requests."""
    waiting = [r for r in scheduler.requests if r.state is RequestState.WAITING]
    return sum(request.client == client for request in waiting) >= count


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 20), SHAPES, st.sampled_from("abcd")), min_size=1, max_size=14
    ),
    blocks=st.integers(13, 40),
    seqs=st.integers(1, 5),
    extra_tokens=st.integers(0, 20),
    is_fair=st.booleans(),
)
def test_a_step_leaves_nothing_unused_that_the_first_could_use(
    requests: list[tuple[int, tuple[int, int, int, bool], str]],
    blocks: int,
    seqs: int,
    extra_tokens: int,
    is_fair: bool,
) -> None:
    scheduler = make_scheduler(
        blocks=blocks, seqs=seqs, tokens=seqs + extra_tokens, is_fair=is_fair
    )
    added: list[Request] = []
    for now in range(600):
        for i, (arrival, (prompt, new, count, _), client) in enumerate(requests):
            if arrival == now:
                for request in make_group(f"r{i}", prompt, count, new, client=client):
                    request.parent_id *= count > 1
                    scheduler.add(request)
                    added.append(request)
        if not scheduler.has_work:
            continue
        preemptions = scheduler.num_preemptions
        waiting = [r for r in scheduler.requests if r.state is RequestState.WAITING]
        waiting.sort(key=scheduler.queues.key)
        plan = scheduler.schedule()
        has_budget = plan.num_tokens < scheduler.max_num_batched_tokens
        if has_budget and scheduler.num_preemptions == preemptions:
            counts = {sequence.request.request_id: sequence.count for sequence in plan.sequences}
            blocks_free = scheduler.kv_cache.blocks.num_free
            for request in scheduler.running:
                is_whole = counts.get(request.request_id, 0) == request.num_uncomputed_tokens
                waits = scheduler.siblings.must_wait(request)
                assert is_whole or waits or blocks_free == 0
            left = [request for request in waiting if request.state is RequestState.WAITING]
            if left and len(scheduler.running) < seqs:
                needed = scheduler.blocks_to_admit(left[0])
                assert needed > blocks_free - scheduler.num_reserved_blocks
        scheduler.commit(plan, answers(plan))
        scheduler.check_integrity()
    assert not scheduler.has_work, "some request starved"
    for request in added:
        assert request.tokens[request.num_prompt_tokens :] == expected_output(request)


@pytest.mark.parametrize("short_of", ["slots", "blocks"])
def test_a_newcomer_takes_a_place_once_the_others_are_a_step_ahead(short_of: str) -> None:
    """One client has all slots, or all blocks, for long outputs. The newcomer waits for neither."""
    seqs, tokens = (8, 64) if short_of == "slots" else (16, 64)
    blocks = 400 if short_of == "slots" else 8 * 26
    scheduler = make_scheduler(blocks=blocks, seqs=seqs, tokens=tokens, is_fair=True)
    ledger = Ledger(scheduler)
    for i in range(2 * seqs):
        scheduler.add(make_request(f"long{i}", 20, 80, client="greedy"))
    for _ in range(10):
        ledger.step()
    taken = len(scheduler.running)
    assert taken == seqs or short_of == "blocks"
    newcomers = [make_request(f"new{i}", 4, 3, client="newcomer") for i in range(2 * seqs)]
    for request in newcomers:
        scheduler.add(request)
    longest = max(request.num_computed_tokens for request in scheduler.running)
    steps = 0
    while newcomers[0].num_output_tokens == 0:
        ledger.step()
        steps += 1
    quantum = PROMPT_COST * (tokens + longest + 10)
    assert steps <= 2 + quantum / (OUTPUT_COST * (taken - 1)), "it waited for an output to end"
    assert ledger.preemptions == 1
    while scheduler.has_work:
        ledger.step()
        counts = Counter(request.client for request in scheduler.running)
        assert counts["newcomer"] <= max(seqs // 2 + 1, seqs - counts["greedy"])
    assert ledger.preemptions < 2 * seqs, "places go to and fro"


def test_the_same_names_change_nothing_under_the_other_policies() -> None:
    plans = []
    for clients in ("abc", "xxx"):
        scheduler = make_scheduler(tokens=8, seqs=2)
        for i, client in enumerate(clients):
            scheduler.add(make_request(f"r{i}", 20, 3, client=client))
        steps = []
        while scheduler.has_work:
            steps.append([(s.request.request_id, s.count) for s in step(scheduler).sequences])
        plans.append(steps)
    assert plans[0] == plans[1]


def test_chunks_of_prompts_take_turns_and_the_cached_cost_nothing() -> None:
    scheduler = make_scheduler(blocks=200, seqs=4, tokens=16, is_fair=True)
    first, second = (make_request(name, 100, 1, client=name) for name in ("first", "second"))
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    for _ in range(4):
        step(scheduler)
    assert abs(first.num_computed_tokens - second.num_computed_tokens) <= 16
    while scheduler.has_work:
        step(scheduler)
    again = make_request("again", first.prompt_token_ids, 1, client="first")
    scheduler.add(again)
    scheduler.add(make_request("other", 4, client="other"))
    plan = scheduler.schedule()
    (sequence,) = (one for one in plan.sequences if one.request is again)
    assert (sequence.start, sequence.count) == (96, 4)
    assert scheduler.queues.counter(again) == cost_of(sequence) == 4 * PROMPT_COST + OUTPUT_COST
    scheduler.finish("again", FinishReason.ABORT)
    scheduler.commit(plan, answers(plan))


def test_a_client_that_comes_back_has_its_counter_and_one_that_pauses_saves_no_turns() -> None:
    scheduler = make_scheduler(blocks=200, seqs=2, tokens=64, is_fair=True)
    queues = scheduler.queues
    scheduler.add(make_request("stays", 8, 40, client="stays"))
    scheduler.add(make_request("large", 60, 1, client="large"))
    while "large" in scheduler.request_ids:
        step(scheduler)
    back = make_request("back", 4, 1, client="large")
    scheduler.add(back)
    assert queues.counter(back) >= 60 * PROMPT_COST, "what it received still counts"
    idle = make_request("idle", 4, 1, client="idle")
    scheduler.add(idle)
    waiting = [r for r in scheduler.requests if r.state is RequestState.WAITING]
    assert queues.counter(idle) == min(map(queues.counter, waiting)) > 0


@pytest.mark.parametrize("newcomer", ["slow", "third"])
def test_a_client_that_waits_for_a_mask_saves_no_turns(newcomer: str) -> None:
    """Neither for itself nor for others that come then."""
    scheduler = make_scheduler(seqs=1, is_fair=True)
    scheduler.add(make_request("masked", 8, 2, client="slow"))
    masks = MaskStates(frozenset({"masked"}))
    busy = [make_request(f"busy{i}", 8, 8, client="busy") for i in range(20)]
    for request in busy:
        scheduler.add(request)
    while scheduler.num_waiting > 4:
        scheduler.commit(plan := scheduler.schedule(masks), answers(plan))
        scheduler.check_integrity()
    others = [make_request(f"other{i}", 8, 8, client=newcomer) for i in range(20)]
    for request in others:
        scheduler.add(request)
    while busy[-1].state is not RequestState.FINISHED:
        step(scheduler)
    assert sum(request.state is RequestState.FINISHED for request in others) <= 6


def test_clients_that_have_gone_are_forgotten() -> None:
    scheduler = make_scheduler(seqs=2, is_fair=True)
    scheduler.add(make_request("stays", 4, 20, client="stays"))
    for i in range(MAX_IDLE_CLIENTS + 50):
        request = make_request(f"r{i}", (1, 2), 1, client=f"client{i}")
        scheduler.add(request)
        scheduler.schedule()
        scheduler.finish(request.request_id, FinishReason.ABORT)
    assert len(scheduler.queues) == 1
    scheduler.check_integrity()  # checks the number of counters
    scheduler.finish("stays", FinishReason.ABORT)
    late = make_request("late", 4, client="client1")
    scheduler.add(late)
    assert scheduler.queues.counter(late) == 0, "an idle engine knows nobody"


def test_the_policy_changes_no_bits(tiny_model: Path) -> None:
    """Requests that lose their places in the middle get the tokens that they get alone."""
    fair = EngineConfig(
        backend="numpy", batch_invariant=True, num_blocks=24, block_size=8, max_num_seqs=4,
        max_num_batched_tokens=16, max_model_len=128, scheduling_policy="fair",
    )  # fmt: skip
    outputs = []
    for config in (fair, replace(fair, scheduling_policy="fcfs")):
        engine = Engine.load(tiny_model, config)
        ledger = Ledger(engine.scheduler)
        prepared = [
            process(
                engine.input_processor, f"{client}{i}", f"the {client} {i}", params, client=client
            )
            for client, count, params in (
                ("a", 6, SamplingParams(max_tokens=60, seed=1, ignore_eos=True, logprobs=1)),
                ("b", 6, SamplingParams(max_tokens=6, seed=2, n=2)),
            )
            for i in range(count)
        ]
        list(engine.run(prepared))
        outputs.append([one.output().outputs for one in prepared])
        assert (ledger.preemptions > 0) == (config is fair)
        engine.check_integrity()
    assert outputs[0] == outputs[1]


def test_accepted_drafts_cost_what_tokens_cost() -> None:
    costs = []
    for wrong in (None, 0, 2, 9):
        scheduler = make_scheduler(is_fair=True)
        request = make_request("r", 5, 12)
        scheduler.add(request)
        while scheduler.has_work:
            (client,) = scheduler.queues._clients.values()  # noqa: SLF001
            if wrong is not None:
                draft(request, min(3, 12 - request.num_output_tokens - 1), wrong)
            step(scheduler)
        costs.append(client.counter)
    assert costs == [5 * PROMPT_COST + 12 * OUTPUT_COST] * 4
