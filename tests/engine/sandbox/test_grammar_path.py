"""Paths: tokens that may come next in a grammar, and their masks, without moving the matcher."""

import itertools
import json
from array import array
from collections.abc import Iterator
from typing import Any

import llguidance
import pytest

from nanovllm.engine.sandbox import grammar_path
from nanovllm.engine.sandbox.grammar_path import PathFinder, PathRequest
from nanovllm.engine.sandbox.json_digits import MAX_DIGITS, DigitLimitedMatcher
from nanovllm.engine.tokenizer import Tokenizer

VOCAB = 267
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def library(tokenizer: Tokenizer) -> Any:
    return llguidance.LLTokenizer(tokenizer.as_json(), n_vocab=VOCAB, eos_token=[VOCAB - 1])


def matcher_of(library: Any, schema: dict[str, Any]) -> DigitLimitedMatcher:
    text = llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    )
    return DigitLimitedMatcher(llguidance.LLMatcher(library, text), library)


def text_of(library: Any, tokens: Any) -> str:
    return str(library.decode_bytes(list(tokens)).decode())


def find(
    matcher: Any, library: Any, limit: int, prompt: str = "", ngram: tuple[int, ...] = (1, 4)
) -> grammar_path.Path:
    """Return the path of a sequence after `prompt`, which ends with the accepted tokens."""
    request = PathRequest(limit, ngram, library.tokenize_str(prompt))
    return PathFinder().find(matcher, matcher.compute_bitmask(), library, request)


def check_masks(library: Any, start: str, path: grammar_path.Path, matcher: Any) -> None:
    """Compare the masks of a path, and the next one, with those of a matcher without paths."""
    fresh = matcher_of(library, SCHEMA)
    fresh.consume_tokens(library.tokenize_str(start))
    assert matcher.compute_bitmask() == fresh.compute_bitmask()
    for token, mask in zip(path.tokens, path.masks, strict=True):
        fresh.consume_tokens([token])
        assert fresh.compute_bitmask() == mask


def test_the_keys_of_an_object_are_forced(library: Any) -> None:
    matcher = matcher_of(library, SCHEMA)
    path = find(matcher, library, 30)
    assert text_of(library, path.tokens) == '{"name":"'
    assert path.num_forced == len(path.tokens)
    check_masks(library, "", path, matcher)
    assert find(matcher, library, 3).tokens == path.tokens[:3]


def test_ngrams_count_where_nothing_is_forced(library: Any) -> None:
    start = '{"name":"Al'
    matcher = matcher_of(library, SCHEMA)
    matcher.consume_tokens(library.tokenize_str(start))
    path = find(matcher, library, 30, f'{start}an","age":7.8 {start}')
    assert text_of(library, path.tokens) == 'an","age":7'
    assert path.num_forced == 0
    check_masks(library, start, path, matcher)
    assert find(matcher, library, 30, f"bla {start}", (2, 4)).tokens == []
    assert find(matcher, library, 30, f'{start}an","age":7.8 {start}', ()).tokens == []


def test_a_path_goes_on_by_ngrams_after_forced_tokens(library: Any) -> None:
    """The text before the forced tokens is new: no n-gram is found there."""
    start = '{"name":"Al"'
    matcher = matcher_of(library, SCHEMA)
    matcher.consume_tokens(library.tokenize_str(start))
    path = find(matcher, library, 30, f'{{"name":"Bo","age":41}} {start}', (3, 4))
    assert text_of(library, path.tokens) == ',"age":41}'
    assert text_of(library, path.tokens[: path.num_forced]) == ',"age":'
    check_masks(library, start, path, matcher)


def test_accepted_tokens_are_looked_up_after_the_prompt(library: Any) -> None:
    matcher, finder = matcher_of(library, SCHEMA), PathFinder()
    prompt, steps = '{"name":"Bobby"} ', ['{"name":"', "B", "o"]
    paths: list[str] = []
    for step in steps:
        tokens = library.tokenize_str(step)
        matcher.consume_tokens(tokens)
        finder.tokens.extend(tokens)
        request = PathRequest(3, (4, 4), () if paths else library.tokenize_str(prompt))
        path = finder.find(matcher, matcher.compute_bitmask(), library, request)
        paths.append(text_of(library, path.tokens))
    assert paths == ["Bob", "obb", "bby"]


class Uncopied(array):  # type: ignore[type-arg]
    """Tokens that nothing copies as a whole."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all tokens were copied")


def test_a_look_up_copies_no_tokens_and_keeps_the_path_out_of_them(library: Any) -> None:
    matcher, finder = matcher_of(library, SCHEMA), PathFinder()
    finder.tokens = Uncopied("q")
    request = PathRequest(30, (3, 4), library.tokenize_str('{"name":"Bo","age":41}'))
    path = finder.find(matcher, matcher.compute_bitmask(), library, request)
    assert text_of(library, path.tokens) == '{"name":"Bo","age":41}'
    assert len(finder.tokens) == len(request.prompt)


def test_a_path_does_not_count_its_digits(library: Any) -> None:
    start, digits = '{"name":"","age":1', "2" * (MAX_DIGITS + 5)
    matcher = matcher_of(library, SCHEMA)
    matcher.consume_tokens(library.tokenize_str(start))
    for _ in range(3):
        path = find(matcher, library, 32, f"{start}{digits} {start}")
        assert text_of(library, path.tokens) == "2" * (MAX_DIGITS - 1)
        check_masks(library, start, path, matcher)


class BrokenMatcher:
    """Fails after the first token."""

    def __init__(self) -> None:
        self.has_failed = False

    def compute_ff_bytes(self) -> bytes:
        return b"ab"

    def consume_tokens(self, tokens: list[int]) -> None:
        self.has_failed = True

    def is_error(self) -> bool:
        return self.has_failed


def test_a_matcher_that_fails_on_a_path_is_lost(library: Any) -> None:
    request, mask = PathRequest(3), b"\xff" * 40
    path = PathFinder().find(BrokenMatcher(), mask, library, request)
    assert path == grammar_path.Path([], [], 0, True)


def test_a_sequence_has_a_budget_of_paths(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths may take 1 ms on average, and 0.1 s more. A call of the clock takes 4 ms here."""
    clock = itertools.count(0.0, 0.004)
    monkeypatch.setattr("time.thread_time", lambda: next(clock))
    finder, matcher = PathFinder(), matcher_of(library, SCHEMA)
    mask = matcher.compute_bitmask()
    started = next(clock)
    for _ in range(1000):
        finder.find(matcher, mask, library, PathRequest(5))
    assert next(clock) - started < 2.0  # 12 s without a budget
