"""From a plan to arrays and back: slots, settings of every row, and forbidden tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.scheduling import batching
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence, SequenceUpdate, StepPlan
from nanovllm.model.sampling import SamplingSettings, TokenLists, TokenLogprobs
from nanovllm.runner.native_model_runner import RunnerOutput
from nanovllm.sampling_params import SamplingParams

BLOCK_SIZE = 4
INF = float("inf")


def request(
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    *,
    blocks: Sequence[int] = (),
    max_new_tokens: int = 50,
    seed: int = 0,
    choice: int = 0,
    stops: Sequence[int] = (),
    bad_words: Sequence[tuple[int, ...]] = (),
    computed: int | None = None,
    **params: Any,
) -> Request:
    """A request that has its answer so far, and blocks for all of its tokens."""
    made = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=None, **params),
        max_new_tokens=max_new_tokens,
        seed=seed,
        choice_index=choice,
        stop_token_ids=frozenset(stops),
        bad_words=tuple(bad_words),
    )
    made.append(list(output))
    made.block_ids = list(blocks) or list(range(-(-len(made.tokens) // BLOCK_SIZE)))
    made.num_computed_tokens = len(made.tokens) - 1 if computed is None else computed
    return made


def plan_of(*shares: tuple[Request, int]) -> StepPlan:
    return StepPlan(tuple(PlannedSequence.of(made, count) for made, count in shares))


def sampling_of(*requests: Request) -> SamplingSettings:
    """The settings of a step in which each of them gets its next token."""
    return batching.build(
        plan_of(*((made, made.num_uncomputed_tokens) for made in requests)), BLOCK_SIZE
    )[2]


def edits_of(settings: SamplingSettings, row: int) -> dict[int, float]:
    return dict_of(settings.edits, settings.edit_values, row)


def history_of(settings: SamplingSettings, row: int) -> dict[int, int]:
    return dict_of(settings.history, settings.history_counts, row)


def dict_of(lists: TokenLists, values: np.ndarray, row: int) -> dict[int, Any]:
    part = slice(lists.starts[row], lists.starts[row + 1])
    values_by_token = dict(zip(lists.token_ids[part].tolist(), values[part].tolist(), strict=True))
    assert len(values_by_token) == part.stop - part.start, "no token twice in a row"
    return values_by_token


# Places -------------------------------------------------------------------------------------------


def test_tokens_get_their_positions_and_slots() -> None:
    decoding = request([5, 6, 7], [8, 9], blocks=[10, 2])
    prompt = request(range(20, 31), blocks=[7, 3, 9], computed=2)
    batch, rows, _ = batching.build(plan_of((decoding, 1), (prompt, 5)), BLOCK_SIZE)
    assert batch.token_ids.tolist() == [9, 22, 23, 24, 25, 26]
    assert batch.positions.tolist() == [4, 2, 3, 4, 5, 6]
    assert batch.query_starts.tolist() == [0, 1, 6]
    assert batch.context_lens.tolist() == [5, 7]
    assert batch.block_tables.tolist() == [[10, 2, 0], [7, 3, 9]]
    assert batch.slots.tolist() == [
        2 * 4 + 0,
        7 * 4 + 2,
        7 * 4 + 3,
        3 * 4 + 0,
        3 * 4 + 1,
        3 * 4 + 2,
    ]
    assert batch.logit_rows.tolist() == [0], "a piece that ends inside the prompt draws nothing"
    assert rows.sampled.tolist() == [0]


def test_a_prompts_last_piece_draws_from_its_last_token() -> None:
    first, second = request(range(6), computed=3), request(range(9), computed=0)
    batch, rows, _ = batching.build(plan_of((first, 3), (second, 9)), BLOCK_SIZE)
    assert batch.logit_rows.tolist() == [2, 11]
    assert rows.sampled.tolist() == [0, 1]


def test_a_request_that_only_reads_its_prompt_draws_nothing() -> None:
    batch, rows, _ = batching.build(
        plan_of((request(range(6), computed=0, max_new_tokens=0), 6)), BLOCK_SIZE
    )
    assert batch.logit_rows.size == 0
    assert rows.sampled.size == 0


def test_prompt_rows_stand_before_the_row_that_is_sampled() -> None:
    plain = request(range(5))
    reported = request(range(10, 18), computed=4, prompt_logprobs=2)
    reported.next_prompt_logprob = 5
    last = request(range(3), computed=0, prompt_logprobs=0)
    batch, rows, _ = batching.build(plan_of((plain, 1), (reported, 4), (last, 3)), BLOCK_SIZE)
    assert batch.logit_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rows.sampled.tolist() == [0, 4, 7]
    assert rows.prompt.rows.tolist() == [1, 2, 3, 5, 6]
    assert rows.prompt.token_ids.tolist() == [15, 16, 17, 1, 2]
    assert rows.prompt.num_logprobs.tolist() == [2, 2, 2, 0, 0]


def test_answers_are_cut_up_in_the_order_of_the_plan() -> None:
    reports = [TokenLogprobs([i], [-1.0], 1) for i in range(6)]
    reported, reading = (
        request(range(4), computed=0, prompt_logprobs=1),
        request(range(40), computed=0, prompt_logprobs=1),
    )
    plan = plan_of((request(range(5)), 1), (reported, 4), (reading, 3), (request(range(7)), 1))
    requests = [sequence.request for sequence in plan.sequences]
    output = RunnerOutput([11, 12, None], [None, reports[5], None], reports[:5])
    assert batching.split(plan, output, vocab=64) == [
        SequenceUpdate(requests[0], (11,), (), []),
        SequenceUpdate(requests[1], (12,), (reports[5],), reports[:3]),
        SequenceUpdate(requests[2], (), (), reports[3:5]),
        SequenceUpdate(requests[3], (), (), [], is_finite=False),
    ]


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "name", "value"),
    [
        ("temperature", "temperature", 0.5),
        ("top_k", "top_k", 17),
        ("top_p", "top_p", 0.25),
        ("min_p", "min_p", 0.125),
        ("repetition_penalty", "repetition_penalty", 1.5),
        ("presence_penalty", "presence_penalty", 0.75),
        ("frequency_penalty", "frequency_penalty", -0.5),
        ("num_logprobs", "logprobs", 3),
    ],
)
def test_each_setting_arrives_on_its_own_row_alone(column: str, name: str, value: float) -> None:
    default = getattr(sampling_of(request()), column)[0]
    setting: dict[str, Any] = {name: value}
    column_values = getattr(sampling_of(request(), request(**setting), request()), column)
    assert column_values.tolist() == [default, value, default]
    assert value != default


def test_a_request_for_no_likely_tokens_still_gets_its_own_reported() -> None:
    sampling = sampling_of(request(), request(logprobs=0), request(logprobs=4))
    assert sampling.num_logprobs.tolist() == [-1, 0, 4]


def test_a_temperature_that_is_as_good_as_zero_is_greedy() -> None:
    assert sampling_of(
        request(temperature=0.0), request(temperature=1e-6), request(temperature=1e-5)
    ).temperature.tolist() == [
        0.0,
        0.0,
        np.float32(1e-5),
    ]


def test_the_key_of_a_draw_is_seed_choice_and_position() -> None:
    sampling = sampling_of(
        request(seed=-1, choice=2), request([1], [2, 3], seed=2**63), request(seed=7)
    )
    assert sampling.seeds.tolist() == [2**64 - 1, 2**63, 7]
    assert sampling.choices.tolist() == [2, 0, 0]
    assert sampling.positions.tolist() == [3, 3, 3]


def test_only_plain_greedy_rows_are_plain_greedy() -> None:
    plain = request(temperature=0.0, top_k=5)
    assert sampling_of(plain, request(temperature=0.0)).is_plain_greedy
    others: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"logprobs": 0},
        {"allowed_token_ids": [1]},
        {"logit_bias": {1: 1.0}},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
    ]
    for other in others:
        assert not sampling_of(plain, request(**{"temperature": 0.0, **other})).is_plain_greedy
    assert not sampling_of(plain, request(temperature=0.0, stops=[9], min_tokens=2)).is_plain_greedy


def test_allowed_tokens_belong_to_their_row() -> None:
    sampling = sampling_of(
        request(), request(allowed_token_ids=[9, 4, 9]), request(), request(allowed_token_ids=[1])
    )
    assert sampling.allowed.starts.tolist() == [0, 0, 2, 2, 3]
    assert sampling.allowed.token_ids.tolist() == [9, 4, 1]
    assert sampling.allowed.rows.tolist() == [1, 1, 3]


def test_penalties_know_every_token_once_and_count_the_answers() -> None:
    sampling = sampling_of(
        request(repetition_penalty=1.5),
        request([1, 2, 2, 1], [2, 9, 9, 2, 2]),
        request([1, 2, 2, 1], [2, 9, 9, 2, 2], presence_penalty=1.0),
    )
    assert [history_of(sampling, row) for row in range(3)] == [
        {1: 0, 2: 0, 3: 0},
        {},
        {1: 0, 2: 3, 9: 2},
    ]


def test_a_history_goes_on_growing_after_it_was_looked_at() -> None:
    growing = request([1], blocks=[0, 1], frequency_penalty=0.5)
    for step, token in enumerate([4, 4, 1, 5]):
        before = sampling_of(growing)
        growing.append([token])
        growing.num_computed_tokens += 1
        assert sum(history_of(before, 0).values()) == step, (
            "arrays of an earlier step do not change"
        )
    assert history_of(sampling_of(growing), 0) == {1: 1, 4: 2, 5: 1}


# Edits --------------------------------------------------------------------------------------------


def test_biases_belong_to_their_row() -> None:
    sampling = sampling_of(
        request(logit_bias={5: 1.5, 7: -100.0}), request(), request(logit_bias={7: 2.0})
    )
    assert [edits_of(sampling, row) for row in range(3)] == [{5: 1.5, 7: -100.0}, {}, {7: 2.0}]


def test_stop_tokens_are_forbidden_until_min_tokens() -> None:
    answers = [[], [4], [4, 4], [4, 4, 4]]
    sampling = sampling_of(
        *(
            request([1], answer, stops=[8, 9], min_tokens=2, logit_bias={9: 3.0, 5: 1.0})
            for answer in answers
        )
    )
    early, late = {9: -INF, 8: -INF, 5: 1.0}, {9: 3.0, 5: 1.0}
    assert [edits_of(sampling, row) for row in range(4)] == [early, early, late, late]


def test_an_ignored_end_of_text_is_forbidden_until_min_tokens() -> None:
    requests = [request([1], answer, min_tokens=2) for answer in ([4], [4, 4])]
    for made in requests:
        made.ignored_eos_token_ids = frozenset({7})
    sampling = sampling_of(*requests)
    assert [edits_of(sampling, row) for row in range(2)] == [{7: -INF}, {}]


def test_a_bad_word_of_one_token_is_always_forbidden() -> None:
    sampling = sampling_of(
        request(),
        request(bad_words=[(6,)], logit_bias={6: 50.0, 2: 1.0}),
        request([1], [6, 6], bad_words=[(6,)]),
    )
    assert [edits_of(sampling, row) for row in range(3)] == [{}, {6: -INF, 2: 1.0}, {6: -INF}]


@pytest.mark.parametrize(
    ("prompt", "output", "forbidden"),
    [
        ([1], [], set()),
        ([1], [7], set()),
        ([1], [7, 8], {9}),
        ([1], [3, 7, 8], {9}),
        ([1], [7, 8, 8], set()),
        ([1], [8], set()),
        ([1], [5], {6, 2}),
        ([1], [8, 7], set()),
        ([1], [7, 8, 5], {6, 2}),
        ([7], [8], set()),
        ([7, 8], [], set()),
        ([5], [], set()),
        ([5], [5], {6, 2}),
        ([1, 7], [8, 7, 8], {9}),
    ],
)
def test_a_longer_bad_word_is_forbidden_where_the_answer_has_all_but_its_end(
    prompt: list[int], output: list[int], forbidden: set[int]
) -> None:
    """One that begins in the prompt may be completed: it is not the answer's."""
    words = [(7, 8, 9), (5, 6), (5, 2)]
    assert edits_of(sampling_of(request(prompt, output, bad_words=words)), 0) == dict.fromkeys(
        forbidden, -INF
    )


def test_forbidden_tokens_win_over_biases_of_the_same_step_alone() -> None:
    made = request([1], [7], bad_words=[(7, 9)], logit_bias={9: 4.0, 3: 1.0})
    assert edits_of(sampling_of(made), 0) == {9: -INF, 3: 1.0}
    made.append([8])
    made.num_computed_tokens += 1
    assert edits_of(sampling_of(made), 0) == {9: 4.0, 3: 1.0}


TOKENS = st.integers(0, 2)


@given(
    words=st.lists(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), max_size=6),
    prompt=st.lists(TOKENS, min_size=1, max_size=4),
    output=st.lists(TOKENS, max_size=6),
)
def test_forbidden_is_what_would_make_the_answer_end_in_a_bad_word(
    words: list[tuple[int, ...]], prompt: list[int], output: list[int]
) -> None:
    expected = {
        token
        for token in range(3)
        for word in words
        if tuple([*output, token][-len(word) :]) == word
    }
    assert edits_of(sampling_of(request(prompt, output, bad_words=words)), 0) == dict.fromkeys(
        expected, -INF
    )
