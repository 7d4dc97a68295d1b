"""Lengths and settings of requests: what passes can finish, errors name value and remedy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import (
    CONTEXT,
    MAX_LOGPROBS,
    embed,
    make_input_processor,
    process,
    submit,
)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "expected"),
    [
        (1, None, CONTEXT - 1),
        (1, 0, 0),
        (1, 1, 1),
        (1, 5, 5),
        (1, CONTEXT - 1, CONTEXT - 1),
        (1, 10**30, CONTEXT - 1),
        (CONTEXT - 1, None, 1),
        (CONTEXT - 1, 1, 1),
        (CONTEXT - 1, 0, 0),
        (CONTEXT, 0, 0),
    ],
)
def test_an_answer_gets_what_it_asks_for_within_the_context(
    input_processor: InputProcessor, prompt_tokens: int, max_tokens: int | None, expected: int
) -> None:
    (request,) = submit(input_processor, [1] * prompt_tokens, max_tokens=max_tokens).requests
    assert request.max_new_tokens == expected
    assert len(request.prompt_token_ids) == prompt_tokens


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"),
    [(CONTEXT, None), (CONTEXT, 1), (CONTEXT + 1, 0), (CONTEXT + 1, None)],
)
def test_a_prompt_that_leaves_no_room_is_refused(
    input_processor: InputProcessor, prompt_tokens: int, max_tokens: int | None
) -> None:
    with pytest.raises(
        ContextLengthError, match=f"has {prompt_tokens} tokens.*context of {CONTEXT}; shorten it"
    ) as caught:
        submit(input_processor, [1] * prompt_tokens, max_tokens=max_tokens)
    assert caught.value.param == "prompt"


def test_what_the_cache_can_never_hold_is_refused(tokenizer: Tokenizer) -> None:
    input_processor = make_input_processor(tokenizer, cache_tokens=8)
    (request,) = submit(
        input_processor, [1] * 5, max_tokens=4
    ).requests  # 8: the last token's keys are never needed
    assert request.max_new_tokens == 4
    submit(input_processor, [1] * 8, max_tokens=0)
    submit(input_processor, [1] * 8, max_tokens=1)
    assert submit(input_processor, [1] * 5, max_tokens=None).requests[0].max_new_tokens == 4, (
        "an answer of any length ends where the cache does"
    )
    for prompt_tokens, max_tokens in ((5, 5), (9, None), (9, 0), (9, 1)):
        with pytest.raises(
            ContextLengthError,
            match=r"KV cache, which has 8; ask for less, or serve with a larger kv_cache_memory",
        ) as caught:
            submit(input_processor, [1] * prompt_tokens, max_tokens=max_tokens)
        assert caught.value.param == "max_tokens"


@given(
    prompt_tokens=st.integers(1, 20),
    max_tokens=st.one_of(st.none(), st.integers(0, 20)),
    cache_tokens=st.integers(1, 20),
)
def test_what_passes_fits_the_context_and_the_cache(
    tokenizer: Tokenizer, prompt_tokens: int, max_tokens: int | None, cache_tokens: int
) -> None:
    try:
        (request,) = submit(
            make_input_processor(tokenizer, cache_tokens=cache_tokens),
            [1] * prompt_tokens,
            max_tokens=max_tokens,
        ).requests
    except ContextLengthError:
        room = CONTEXT - prompt_tokens
        asked = min(1, room) if max_tokens is None else min(max_tokens, room)
        assert (
            room < 0
            or (room == 0 and max_tokens != 0)
            or prompt_tokens + max(asked - 1, 0) > cache_tokens
        ), "it would have fitted"
        return
    assert prompt_tokens + request.max_new_tokens <= CONTEXT
    assert prompt_tokens + max(request.max_new_tokens - 1, 0) <= cache_tokens
    assert max_tokens == 0 or request.max_new_tokens > 0


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_have_a_limit(input_processor: InputProcessor, name: str) -> None:
    submit(input_processor, **{name: MAX_LOGPROBS})
    with pytest.raises(
        InvalidRequestError,
        match=rf"{name} is {MAX_LOGPROBS + 1}, the limit is {MAX_LOGPROBS} \(max_logprobs\)",
    ) as caught:
        submit(input_processor, **{name: MAX_LOGPROBS + 1})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("logit_bias", lambda i: {0: 1.0, i: 1.0}),
        ("allowed_token_ids", lambda i: [0, i]),
        ("stop_token_ids", lambda i: [0, i]),
    ],
)
def test_settings_name_tokens_of_the_vocabulary(
    input_processor: InputProcessor, name: str, make: Any
) -> None:
    last = input_processor.model.vocab - 1
    submit(input_processor, **{name: make(last)})
    with pytest.raises(
        InvalidRequestError,
        match=f"{name} has token ids outside the vocabulary of 0 to {last}: {last + 1}",
    ) as caught:
        submit(input_processor, **{name: make(last + 1)})
    assert caught.value.param == name


def test_bad_words_are_forbidden_in_both_spellings(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    (request,) = submit(input_processor, bad_words=["the", " the", "a"]).requests
    assert set(request.bad_words) == {
        tuple(tokenizer.encode(text)) for text in ("the", " the", "a", " a")
    }
    assert len(request.bad_words) == 4, "no spelling comes twice"
    assert len(tokenizer.encode(" the")) == 1, "with its space it is another token"


def test_a_bad_word_of_spaces_keeps_its_spaces(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    (request,) = submit(input_processor, bad_words=["  "]).requests
    assert set(request.bad_words) == {tuple(tokenizer.encode("  ")), tuple(tokenizer.encode(" "))}


def test_bad_words_that_the_model_cannot_spell_are_left_out(tokenizer: Tokenizer) -> None:
    input_processor = make_input_processor(tokenizer, vocab=max(tokenizer.encode("a ")) + 1)
    assert max(tokenizer.encode("the")) >= input_processor.model.vocab
    (request,) = submit(input_processor, "a", bad_words=["a", "the"]).requests
    assert max(tokenizer.encode(" a")) >= input_processor.model.vocab
    assert request.bad_words == (tuple(tokenizer.encode("a")),)


def test_end_of_text_is_a_stop_token_unless_ignored(input_processor: InputProcessor) -> None:
    end = input_processor.model.vocab - 1
    (request,) = submit(input_processor, stop_token_ids=[3]).requests
    assert request.stop_token_ids == {3, end}
    assert request.eos_token_ids == {end}
    assert request.ignored_eos_token_ids == set()
    (request,) = submit(input_processor, stop_token_ids=[3], ignore_eos=True).requests
    assert request.stop_token_ids == {3}
    assert request.ignored_eos_token_ids == {end}
    assert request.eos_token_ids == frozenset()
    (request,) = submit(input_processor, stop_token_ids=[end], ignore_eos=True).requests
    assert request.stop_token_ids == {end}, "asked for by name it counts"


def test_n_answers_are_n_sequences_that_differ_in_their_choice(
    input_processor: InputProcessor,
) -> None:
    prepared = submit(input_processor, n=3, seed=5)
    assert [request.request_id for request in prepared.requests] == ["r-0", "r-1", "r-2"]
    assert [request.choice_index for request in prepared.requests] == [0, 1, 2]
    assert {request.seed for request in prepared.requests} == {5}
    assert [request.request_id for request in submit(input_processor).requests] == ["r"]
    assert len(prepared.output().outputs) == 3


def test_greedy_answers_are_one_sequence_and_count_as_many(input_processor: InputProcessor) -> None:
    prepared = submit(input_processor, n=3, temperature=0)
    assert [request.request_id for request in prepared.requests] == ["r"]
    assert len(prepared.output().outputs) == 3
    assert [
        submit(input_processor, temperature=0, **settings).size.choices
        for settings in ({}, {"n": 3}, {"n": 2, "best_of": 5})
    ] == [1, 3, 5]


def test_the_best_of_more_is_found_by_their_log_probabilities(
    input_processor: InputProcessor,
) -> None:
    prepared = submit(input_processor, n=2, best_of=4, seed=5)
    assert [request.choice_index for request in prepared.requests] == [0, 1, 2, 3]
    assert {request.sampling.logprobs for request in prepared.requests} == {0}
    assert {
        request.sampling.logprobs
        for request in submit(input_processor, n=2, best_of=4, logprobs=3).requests
    } == {3}
    for settings in ({"n": 4}, {"n": 4, "best_of": 4}, {"best_of": 4, "temperature": 0}):
        assert {
            request.sampling.logprobs for request in submit(input_processor, **settings).requests
        } == {None}, "nothing to rank"
    assert (prepared.size.choices, len(prepared.output().outputs)) == (4, 2)


def test_priority_and_salt_are_passed_on(tokenizer: Tokenizer) -> None:
    input_processor = make_input_processor(tokenizer, has_priorities=True)
    (request,) = process(
        input_processor, "r", "hi", SamplingParams(), priority=-3, cache_salt="salt", client="key"
    ).requests
    assert (request.priority, request.cache_salt, request.client) == (-3, "salt", "key")


def test_a_priority_is_refused_where_requests_are_served_by_arrival(
    input_processor: InputProcessor,
) -> None:
    """As in vLLM, no client overtakes others or takes their blocks unless the operator permits."""
    assert (
        process(input_processor, "r", "hi", SamplingParams(), priority=0).requests[0].priority == 0
    )
    with pytest.raises(InvalidRequestError, match="scheduling_policy='priority'") as caught:
        process(input_processor, "r", "hi", SamplingParams(), priority=-1)
    assert caught.value.param == "priority"
    with pytest.raises(InvalidRequestError, match="scheduling_policy='priority'"):
        embed(input_processor, "r", "hi", priority=1)


def test_ids_are_unlike_each_other_whatever_names_they_are_made_of(
    input_processor: InputProcessor,
) -> None:
    """A sequence's id ends with its choice. Names that end alike must not make two ids equal."""
    ids: list[str] = []
    for name in ("x", "x-0", "x-0-0", "0", "0-x", ""):
        prepared = process(
            input_processor,
            input_processor.new_request_id(name),
            "hi",
            SamplingParams(n=3, max_tokens=1),
        )
        ids += [request.request_id for request in prepared.requests]
        ids.append(prepared.request_id)
    assert len(set(ids)) == len(ids)


def test_seeds_are_the_callers_or_drawn(tokenizer: Tokenizer) -> None:
    def seeds(engine_seed: int | None, settings: Mapping[str, Any]) -> list[int]:
        input_processor = make_input_processor(tokenizer, seed=engine_seed)
        return [submit(input_processor, **settings).requests[0].seed for _ in range(4)]

    assert seeds(1, {"seed": -7}) == [-7] * 4
    assert seeds(1, {"seed": 0}) == [0] * 4
    drawn = seeds(1, {})
    assert len(set(drawn)) == 4, "two requests without a seed do not get the same answer"
    assert all(0 <= seed < 2**64 for seed in drawn)
    assert drawn == seeds(1, {}), "the engine's seed repeats them"
    assert drawn != seeds(2, {})
    assert seeds(None, {}) != seeds(None, {})


def test_a_refused_request_changes_nothing_for_the_next(tokenizer: Tokenizer) -> None:
    clean, other = make_input_processor(tokenizer, seed=1), make_input_processor(tokenizer, seed=1)
    for prompt, settings in (("", {}), ("hi", {"logprobs": 99}), ("x" * 99, {})):
        with pytest.raises(InvalidRequestError):
            submit(other, prompt, **settings)
    assert submit(clean).requests[0].seed == submit(other).requests[0].seed


def test_the_output_begins_with_the_prompt_as_it_was_given(
    input_processor: InputProcessor, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    output = submit(input_processor, "hi").output()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == (
        "r",
        "hi",
        tokenizer.encode("hi"),
    )
    given_ids = [1, 2, 3]
    prepared = submit(input_processor, given_ids)
    given_ids.append(4)
    assert (
        prepared.output().prompt,
        prepared.output().prompt_token_ids,
    ) == (None, [1, 2, 3])


def test_many_prompts_share_what_their_settings_say(
    input_processor: InputProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spelling a thousand bad words for each of a thousand prompts would take a minute."""
    spelled: list[SamplingParams] = []
    spell = input_processor._bad_words  # noqa: SLF001

    def count(params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        spelled.append(params)
        return spell(params)

    monkeypatch.setattr(input_processor, "_bad_words", count)
    first = SamplingParams(max_tokens=4, bad_words=["the"], allowed_token_ids=range(100))
    others = SamplingParams(max_tokens=4, bad_words=["a"])
    made = [process(input_processor, f"r{i}", "the", first).requests[0] for i in range(5)]
    assert spelled == [first]
    assert len({id(request.rules) for request in made}) == 1
    (other,) = process(input_processor, "other", "the", others).requests
    (again,) = process(input_processor, "again", "the", first).requests
    assert other.bad_words != again.bad_words == made[0].bad_words
    wrong = SamplingParams(max_tokens=4, allowed_token_ids=[10**9])
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            process(input_processor, "wrong", "the", wrong)
