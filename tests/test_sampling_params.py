"""SamplingParams: ranges, error messages and immutability."""

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import (
    GREEDY_TEMPERATURE,
    MAX_COUNT,
    MAX_LOGIT_EDITS,
    MAX_STOP_STRINGS,
    SamplingParams,
)

HUGE = 10**400  # an integer beyond float64, which JSON may have
WHOLE: dict[str, tuple[int, int | None]] = {
    "n": (1, 128),
    "max_tokens": (0, None),
    "min_tokens": (0, MAX_COUNT),
    "top_k": (-1, MAX_COUNT),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_COUNT),
    "prompt_logprobs": (0, MAX_COUNT),
    "best_of": (1, 20),
    "truncate_prompt_tokens": (-1, MAX_COUNT),
}
REAL = {
    "temperature": (0, 2),
    "top_p": (math.nextafter(0, 1), 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-5, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "speculative",
    "add_special_tokens",
)
TEXTS = {"stop": MAX_STOP_STRINGS, "bad_words": MAX_LOGIT_EDITS}
IDS = ("stop_token_ids", "allowed_token_ids")


def params(name: str, value: object) -> SamplingParams:
    extra = {"max_tokens": None} if name == "min_tokens" else {}
    return SamplingParams(**{name: value, **extra})  # type: ignore[arg-type]


def refuse(name: str, value: object) -> str:
    """Return the error message for an invalid value, which names the field."""
    with pytest.raises(InvalidRequestError) as caught:
        params(name, value)
    message = str(caught.value)
    assert caught.value.param == name
    assert name in message
    assert len(message) < 400
    return message


def test_every_setting_is_covered_here() -> None:
    assert {field.name for field in fields(SamplingParams)} == {
        *WHOLE,
        *REAL,
        *FLAGS,
        *TEXTS,
        *IDS,
        "logit_bias",
        "structured_outputs",
        "truncation_side",
    }


def _whole_edges() -> Iterator[tuple[str, int, bool]]:
    for name, (low, high) in WHOLE.items():
        yield from ((name, low, True), (name, low - 1, False))
        yield from (
            ((name, high, True), (name, high + 1, False))
            if high is not None
            else ((name, HUGE, True),)
        )


@pytest.mark.parametrize(("name", "value", "is_allowed"), list(_whole_edges()))
def test_edges_of_integers(name: str, value: int, is_allowed: bool) -> None:
    if is_allowed:
        assert getattr(params(name, value), name) == (
            0 if (name, value) == ("top_k", -1) else value
        )
    else:
        message = refuse(name, value)
        low, high = WHOLE[name]
        assert str(value) in message
        assert (f"at least {low}" if high is None else f"from {low} to {high}") in message


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [1.0, "1", True, [1], math.nan, np.float64(1)])
def test_what_is_no_integer(name: str, value: object) -> None:
    assert "integer" in refuse(name, value)


@pytest.mark.parametrize("name", WHOLE)
def test_none_means_unlimited_only_where_the_default_says_so(name: str) -> None:
    if name in (
        "max_tokens",
        "seed",
        "logprobs",
        "prompt_logprobs",
        "best_of",
        "truncate_prompt_tokens",
    ):
        assert getattr(params(name, None), name) is None
    else:
        refuse(name, None)


@pytest.mark.parametrize("name", REAL)
def test_edges_of_numbers(name: str) -> None:
    low, high = REAL[name]
    for value in (low, high):
        assert getattr(params(name, value), name) == value
    for value in (
        math.nextafter(low, -math.inf),
        math.nextafter(high, math.inf),
        math.inf,
        -math.inf,
        math.nan,
        HUGE,
        -HUGE,
    ):
        refuse(name, value)
    assert f"to {high}" in refuse(name, 1000)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j, np.complex64(1j)])
def test_what_is_no_number(name: str, value: object) -> None:
    assert "must be a number" in refuse(name, value)


def test_integers_are_numbers() -> None:
    assert isinstance(SamplingParams(temperature=1, top_p=1).temperature, float)
    assert "above 0" in refuse("top_p", 0)


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    assert getattr(params(name, True), name) is True
    for value in (1, "true", None):
        assert "true or false" in refuse(name, value)


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name: str) -> None:
    limit = TEXTS[name]
    assert getattr(params(name, "one"), name) == ("one",)
    assert getattr(params(name, iter(["one", "two"])), name) == ("one", "two")
    assert getattr(params(name, None), name) == ()
    assert len(getattr(params(name, ["x"] * limit), name)) == limit
    assert f"{limit + 1} entries, the limit is {limit}" in refuse(name, ["x"] * (limit + 1))
    assert "must be a list" in refuse(name, 5)
    for wrong in ("", [""], ["a", None], [b"a"], [3]):
        assert "not empty" in refuse(name, wrong)
    assert "surrogate" in refuse(name, ["fine", "a\ud800"])
    refuse(name, ["x" * 10**7, 3])


@pytest.mark.parametrize("name", IDS)
def test_token_ids(name: str) -> None:
    assert getattr(params(name, None), name) is None
    assert getattr(params(name, [5, 3, 5, 0]), name) == (5, 3, 0), "each once, in order"
    assert "must be a list" in refuse(name, 5)
    for wrong in ([-1], [True], [1.0], ["1"], "12", [None]):
        assert "integer" in refuse(name, wrong)


def test_a_list_that_allows_nothing_is_refused() -> None:
    assert "leave it out" in refuse("allowed_token_ids", [])
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == ()
    assert f"the limit is {MAX_LOGIT_EDITS}" in refuse("stop_token_ids", range(MAX_LOGIT_EDITS + 1))
    many = SamplingParams(allowed_token_ids=range(60_000)).allowed_token_ids
    assert many == tuple(range(60_000))


def test_logit_bias() -> None:
    assert SamplingParams(logit_bias={3: 100, 4: -100.0}).logit_bias == {3: 100.0, 4: -100.0}
    assert SamplingParams(logit_bias={}).logit_bias == {}
    for key in (-1, "3", True, 1.0, None):
        assert "token ids" in refuse("logit_bias", {key: 1.0})
    assert "token ids: -1, 'a'" in refuse("logit_bias", {-1: 1.0, 3: 1.0, "a": 1.0})
    for value in (100.1, -101, math.nan, math.inf, "1", None, True, HUGE):
        assert "from -100 to 100" in refuse("logit_bias", {3: value})
    assert "must map" in refuse("logit_bias", [3])
    assert f"the limit is {MAX_LOGIT_EDITS}" in refuse(
        "logit_bias", dict.fromkeys(range(MAX_LOGIT_EDITS + 1), 0.0)
    )


def test_min_tokens_may_not_pass_max_tokens() -> None:
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4
    assert SamplingParams(min_tokens=4, max_tokens=None).min_tokens == 4
    with pytest.raises(
        InvalidRequestError,
        match="min_tokens is 5 but max_tokens only 4; lower the first or raise the second",
    ) as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"


def test_the_best_are_of_at_least_as_many() -> None:
    assert SamplingParams(n=4, best_of=4).best_of == 4
    with pytest.raises(
        InvalidRequestError,
        match="best_of is 3 but n is 4, the number of choices to return; raise the first",
    ) as caught:
        SamplingParams(n=4, best_of=3)
    assert caught.value.param == "best_of"


def test_no_token_of_the_prompt_is_too_few() -> None:
    assert "at least 1, or -1 for as many as fit" in refuse("truncate_prompt_tokens", 0)


@pytest.mark.parametrize(
    ("settings", "candidates", "sequences", "ranks"),
    [
        ({}, 1, 1, False),
        ({"n": 3}, 3, 3, False),
        ({"n": 3, "best_of": 3}, 3, 3, False),
        ({"n": 3, "best_of": 5}, 5, 5, True),
        ({"n": 3, "temperature": 0}, 3, 1, False),
        ({"n": 3, "best_of": 5, "temperature": 0}, 5, 1, False),
    ],
)
def test_answers_that_are_asked_for_and_sequences_that_are_computed(
    settings: dict[str, Any], candidates: int, sequences: int, ranks: bool
) -> None:
    chosen = SamplingParams(**settings)
    assert (chosen.num_candidates, chosen.num_sequences, chosen.ranks_choices) == (
        candidates,
        sequences,
        ranks,
    )


def test_unknown_settings_and_settings_by_place_are_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[call-arg]


def test_settings_do_not_change_afterwards() -> None:
    bias, words = {3: 1.0}, ["a"]
    settings = SamplingParams(logit_bias=bias, bad_words=words)
    bias[3], words[0] = 50.0, "b"
    assert settings.logit_bias == {3: 1.0}
    assert settings.bad_words == ("a",)
    with pytest.raises(FrozenInstanceError):
        settings.n = 2  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        settings.top_q = 2  # type: ignore[attr-defined]


def test_a_changed_copy_is_checked_too() -> None:
    settings = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 1.0})
    assert SamplingParams(**settings.as_dict()) == settings == replace(settings)
    assert SamplingParams(**{**settings.as_dict(), "n": 3}).n == 3
    with pytest.raises(InvalidRequestError, match="n is 0"):
        replace(settings, n=0)


def test_what_greedy_and_penalties_mean() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=GREEDY_TEMPERATURE / 2).is_greedy
    assert not SamplingParams(temperature=GREEDY_TEMPERATURE).is_greedy
    assert not SamplingParams().has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert params(name, 0.5).has_penalties
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams().stop_strings == ()


@given(
    name=st.sampled_from([field.name for field in fields(SamplingParams)]),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(st.characters(codec=None), max_size=5)
        | st.binary(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)
def test_whatever_is_given_the_error_is_ours(name: str, value: object) -> None:
    try:
        settings = params(name, value)
    except InvalidRequestError as error:
        refusal = error
    else:
        assert SamplingParams(**settings.as_dict()) == settings
        return
    assert refusal.param == name
    assert name in str(refusal)


def test_another_side_of_truncation_is_refused() -> None:
    with pytest.raises(
        InvalidRequestError, match="'middle' but must be 'left' or 'right'"
    ) as caught:
        SamplingParams(truncation_side="middle")  # type: ignore[arg-type]
    assert caught.value.param == "truncation_side"
