"""Prompts: their forms, what is refused, and how they are truncated."""

import array
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_reader import MAX_TRUNCATED_BYTES, PromptReader
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from tests.support.checkpoints import END_OF_TEXT
from tests.support.family_tokenizers import FAMILIES
from tests.support.processing import (
    CONTEXT,
    embed,
    make_input_processor,
    submit,
)
from tests.support.tokenizers import word_piece


def test_every_form_of_prompt_is_read(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("hi")
    assert input_processor.reader.read("hi") == ("hi", ids)
    assert input_processor.reader.read({"prompt": "hi"}) == ("hi", ids)
    for prompt in (ids, tuple(ids), {"prompt_token_ids": ids}, range(3, 5), array.array("q", ids)):
        expected = [3, 4] if isinstance(prompt, range) else ids
        assert input_processor.reader.read(prompt) == (None, expected)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        ([], "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt_token_ids": []}, "empty"),
        (None, "is None but must be text or a list of token ids"),
        (7, "is 7 but must be text or a list of token ids"),
        (b"hi", "a bytes"),
        (bytearray(b"hi"), "a bytearray"),
        ({1, 2}, "a set"),
        (np.array([1.5, 2]), r"has 1\.5 among its token ids"),
        ([1, "two"], "has 'two' among its token ids"),
        ([1, None], "has None among its token ids"),
        ([1, 2.0], r"has 2\.0 among its token ids"),
        ([1, True], "has True among its token ids"),
        ([[1]], "has a list among its token ids"),
        (["hi"], "has 'hi' among its token ids.*give one prompt, not a list of prompts"),
        ({}, "either 'prompt' or 'prompt_token_ids'"),
        ({"text": "hi"}, "not 'text'"),
        (
            {"prompt": "hi", "prompt_token_ids": [1]},
            "either 'prompt' or 'prompt_token_ids', not 'prompt', 'prompt_token_ids'",
        ),
        ({"prompt": [1]}, "'prompt' is a list but must be text"),
        ({"prompt_token_ids": "hi"}, "'prompt_token_ids' is 'hi' but must be a list of token ids"),
        ({"prompt_token_ids": None}, "is None"),
        ([267], "vocabulary of 0 to 266: 267"),
        ([-1], "vocabulary of 0 to 266: -1"),
        (
            [10**40, *range(300, 310)],
            r"vocabulary of 0 to 266: 1000\d*, 300, 301, .*, 308, \.\.\.$",
        ),
        ("a\ud800b", r"half of a surrogate pair.*send valid Unicode"),
        ("\udc00", r"has '\\udc00' at character 0"),
    ],
)
def test_a_bad_prompt_is_refused_and_named(
    input_processor: InputProcessor, prompt: Any, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        submit(input_processor, prompt)
    assert caught.value.param == "prompt"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "prompt",
    [
        "x" * 10_000_000,
        [1] * 2_000_000,
        ["x" * 10_000_000],
        {"prompt": "x" * 10_000_000},
        {"x" * 10_000_000: "hi"},
    ],
)
def test_a_huge_prompt_is_refused_unread_and_not_sent_back(
    input_processor: InputProcessor, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of it is tokenized, or its ids are looked at one by one."""
    monkeypatch.setattr(input_processor.reader, "_tokenizer", None)
    monkeypatch.setattr(input_processor.reader, "check_ids", None)
    with pytest.raises(InvalidRequestError) as caught:
        submit(input_processor, prompt)
    assert len(str(caught.value)) < 300


def test_an_early_refusal_says_no_more_than_is_known(
    input_processor: InputProcessor, tokenizer: Tokenizer
) -> None:
    longest = tokenizer.max_token_bytes
    assert longest == len(END_OF_TEXT)
    with pytest.raises(
        ContextLengthError,
        match=f"at least {CONTEXT + 1} tokens, the limit is {CONTEXT}; shorten it",
    ):
        submit(input_processor, "x" * longest * (CONTEXT + 1))


def test_text_that_a_tokenizer_makes_one_unknown_word_of_is_not_too_long() -> None:
    input_processor = make_input_processor(word_piece())
    _, token_ids = input_processor.reader.read("q" * 100_000)
    assert len(token_ids) == 1


def test_text_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no tokens once encoded"):
        submit(make_input_processor(word_piece()), "   ")


def test_tokens_that_the_model_does_not_have_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="outside the vocabulary of 0 to 9"):
        submit(make_input_processor(tokenizer, vocab=10), "hello")


def test_a_special_token_in_the_prompt_is_text(input_processor: InputProcessor) -> None:
    _, token_ids = input_processor.reader.read(END_OF_TEXT)
    assert len(token_ids) == len(END_OF_TEXT)


# Truncated prompts --------------------------------------------------------------------------------


@given(
    length=st.integers(1, 40),
    kept=st.integers(1, CONTEXT),
    as_text=st.booleans(),
    side=st.sampled_from(["left", "right", None]),
)
def test_one_end_of_the_prompt_is_cut_off(
    tokenizer: Tokenizer, length: int, kept: int, as_text: bool, side: str | None
) -> None:
    """The beginning by default; of a text that is embedded the end."""
    text = ("the end, " * length)[:length]
    ids = tokenizer.encode(text)
    prompt = text if as_text else ids
    given_side: dict[str, Any] = {} if side is None else {"truncation_side": side}
    input_processor = make_input_processor(tokenizer)
    output = submit(
        input_processor, prompt, truncate_prompt_tokens=kept, max_tokens=0, **given_side
    ).output()
    assert output.prompt_token_ids == (ids[:kept] if side == "right" else ids[-kept:])
    assert output.prompt == (tokenizer.decode(output.prompt_token_ids) if as_text else None)
    (request,) = embed(
        input_processor, "r", prompt, truncate_prompt_tokens=kept, **given_side
    ).requests
    assert list(request.prompt_token_ids) == (ids[-kept:] if side == "left" else ids[:kept])


def test_a_text_that_is_embedded_may_fill_the_context(input_processor: InputProcessor) -> None:
    (request,) = embed(
        input_processor, "r", [1] * (CONTEXT + 5), truncate_prompt_tokens=-1
    ).requests
    assert len(request.prompt_token_ids) == CONTEXT


def test_more_tokens_than_the_context_has_are_refused(input_processor: InputProcessor) -> None:
    for check in (
        submit,
        lambda input_processor, **given: embed(input_processor, "r", "hi", **given),
    ):
        with pytest.raises(
            InvalidRequestError, match=f"is {CONTEXT + 1}, the limit is {CONTEXT}"
        ) as caught:
            check(input_processor, truncate_prompt_tokens=CONTEXT + 1)
        assert caught.value.param == "truncate_prompt_tokens"


def test_a_truncated_prompt_must_fit(input_processor: InputProcessor) -> None:
    for prompt in ([1] * 30, "x" * 3000):
        with pytest.raises(
            ContextLengthError, match=f"has {CONTEXT} tokens.*context of {CONTEXT}; shorten it"
        ):
            submit(input_processor, prompt, truncate_prompt_tokens=CONTEXT)


@given(
    prompt_tokens=st.integers(1, 30),
    max_tokens=st.one_of(st.none(), st.integers(0, 20)),
    cache_tokens=st.integers(1, 20),
)
def test_minus_1_keeps_as_many_as_fit(
    tokenizer: Tokenizer, prompt_tokens: int, max_tokens: int | None, cache_tokens: int
) -> None:
    input_processor, ids = (
        make_input_processor(tokenizer, cache_tokens=cache_tokens),
        list(range(prompt_tokens)),
    )

    def fits(kept: int) -> bool:
        try:
            (request,) = submit(input_processor, ids[-kept:], max_tokens=max_tokens).requests
        except ContextLengthError:
            return False
        return max_tokens is None or request.max_new_tokens == max_tokens

    try:
        (request,) = submit(
            input_processor, ids, max_tokens=max_tokens, truncate_prompt_tokens=-1
        ).requests
    except ContextLengthError:
        assert not fits(1)
        return
    kept = len(request.prompt_token_ids)
    assert list(request.prompt_token_ids) == ids[-kept:]
    assert fits(kept)
    assert kept == prompt_tokens or not fits(kept + 1)


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(
    input_processor: InputProcessor,
) -> None:
    with pytest.raises(
        ContextLengthError,
        match=(
            f"max_tokens is {CONTEXT}, which leaves no room for a prompt.*of {CONTEXT} tokens.*"
            "; lower it"
        ),
    ) as caught:
        submit(input_processor, truncate_prompt_tokens=-1, max_tokens=CONTEXT)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("around", [(1, 0), (1, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_the_tokens_around_a_truncated_text_are_kept(around: tuple[int, int], count: int) -> None:
    """As by transformers, except where they alone are more than the tokens to keep."""
    library = FAMILIES["llama2"]().library
    bos, end = (
        " ".join([name] * number) for name, number in zip(("<s>", "</s>"), around, strict=True)
    )
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {end}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = Tokenizer(library)
    reader = make_input_processor(tokenizer).reader
    text = "Hello the world is"
    whole = tokenizer.encode(text)
    for side, kept in (("left", slice(-count, None)), ("right", slice(count))):
        _, token_ids = reader.read(text, kept=kept)
        if count < sum(around):
            assert token_ids == whole[kept]
            continue
        library.enable_truncation(count, direction=side)
        assert token_ids == library.encode(text).ids
        library.no_truncation()
        _, plain = reader.read(text, kept=kept, add_special_tokens=False)
        assert plain == tokenizer.encode(text, add_special_tokens=False)[kept]
        assert reader.read(whole, kept=kept) == (None, whole[kept])


def test_text_that_is_to_be_truncated_has_a_limit(input_processor: InputProcessor) -> None:
    said = (
        f"has {2 * MAX_TRUNCATED_BYTES} bytes, the limit .* is {MAX_TRUNCATED_BYTES}; "
        "send the part to be read"
    )
    with pytest.raises(InvalidRequestError, match=said) as caught:
        submit(input_processor, "é" * MAX_TRUNCATED_BYTES, truncate_prompt_tokens=3)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("name", ["qwen", "llama3", "llama2"])
def test_the_limit_of_a_text_grows_with_the_context(name: str) -> None:
    tokenizer = FAMILIES[name]().tokenizer
    limits = Limits(100_000, 100_000, 5, has_priorities=False)
    reader = PromptReader(tokenizer, tokenizer.vocab, limits)
    reader.check_text("a" * 1_600_000)
    with pytest.raises(InvalidRequestError, match=r"has 1600001 bytes, the limit .* is 1600000; "):
        reader.check_text("a" * 1_600_001)
    with pytest.raises(InvalidRequestError, match="to be truncated is"):
        reader.check_text("a" * 1_600_000, is_truncated=True)


def test_the_limit_counts_what_the_tokenizer_makes_of_a_text(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer.as_json())
    library.normalizer = tokenizers.normalizers.Replace("a", "b" * 16)
    growing = make_input_processor(Tokenizer(library))
    limit = MAX_TRUNCATED_BYTES * 4 // growing.tokenizer.growth
    assert limit <= MAX_TRUNCATED_BYTES // 4
    growing.reader.check_text("a" * limit, is_truncated=True)
    with pytest.raises(InvalidRequestError, match=f"has {limit + 1} bytes, the limit .* {limit};"):
        growing.reader.check_text("a" * (limit + 1), is_truncated=True)
