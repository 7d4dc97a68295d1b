"""Incremental text equals the text of all tokens, and no later token changes released text."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.tokenizer import Tokenizer
from tests.support.checkpoints import MERGES
from tests.support.tokenizers import byte_fallback, metaspace, word_piece

END = 256 + len(MERGES)
VOCAB = END + 1
TOKENS = st.lists(st.integers(0, VOCAB + 2), max_size=40)  # the last few have no token
CONTINUATIONS = (b"", b"\x80", b"\xbf\x80", b"\x80\x80\x80", b"\x9f\x98\x80", b"a", b"\xf0\x9f")


def pieces_of(
    tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool = True
) -> list[str]:
    """Return the text released by each token and by flush; peeking returns the same text."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    pieces = []
    for token_id in token_ids:
        peeked = decoder.peek(token_id), decoder.peek(token_id)
        pieces.append(decoder.push(token_id))
        assert peeked == (pieces[-1], pieces[-1])
    return [*pieces, decoder.flush()]


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return one token per byte."""
    token_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    return [token_of[bytes([byte])] for byte in data]


@given(token_ids=TOKENS, skip=st.booleans())
@example(token_ids=[END, END], skip=False)
def test_pieces_join_to_the_whole_text(
    tokenizer: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    assert "".join(pieces_of(tokenizer, token_ids, skip_special_tokens=skip)) == tokenizer.decode(
        token_ids, skip_special_tokens=skip
    )


@given(
    data=st.one_of(
        st.binary(max_size=12),
        st.text(max_size=4).map(str.encode),
        st.text(max_size=4).map(lambda text: text.encode()[:-1]),
    )
)
@example(data=b"\xf0\x9f\x98\x80")
@example(data=b"\xe2\x82a\xf0\x9f\x98")
@example(data=b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf")
def test_what_is_out_stays_true_whatever_follows_and_no_more_is_held_than_a_character(
    tokenizer: Tokenizer, data: bytes
) -> None:
    decoder = IncrementalDecoder(tokenizer)
    released = ""
    for count, token_id in enumerate(byte_tokens(tokenizer, data), start=1):
        released += decoder.push(token_id)
        for more in CONTINUATIONS:
            assert (data[:count] + more).decode(errors="replace").startswith(released), (
                "a half character was called broken too early"
            )
        whole = data[:count].decode(errors="replace")
        assert whole.startswith(released)
        assert whole[len(released) :] in ("", "\ufffd", "\ufffd" * 2), (
            "a complete character was held back"
        )
    assert released + decoder.flush() == data.decode(errors="replace")


@pytest.mark.parametrize("text", ["🙂", "é", "世界", "e\u0301", "👩‍👩‍👧", "a🙂b"])
def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, byte_tokens(tokenizer, text.encode()))
    assert [piece for piece in pieces if piece] == list(text)
    assert "\ufffd" not in "".join(pieces)


def test_special_tokens_are_left_out_or_written_out(tokenizer: Tokenizer) -> None:
    token_ids = [*tokenizer.encode("ab"), END, *tokenizer.encode("c")]
    assert pieces_of(tokenizer, token_ids) == ["a", "b", "", "c", ""]
    assert pieces_of(tokenizer, token_ids, skip_special_tokens=False) == [
        "a",
        "b",
        "<|endoftext|>",
        "c",
        "",
    ]


def test_a_special_token_breaks_a_character_only_where_it_is_text(tokenizer: Tokenizer) -> None:
    first, *rest = byte_tokens(tokenizer, "é".encode())
    assert "".join(pieces_of(tokenizer, [first, END, *rest])) == "é"
    assert (
        "".join(pieces_of(tokenizer, [first, END, *rest], skip_special_tokens=False))
        == "\ufffd<|endoftext|>\ufffd"
    )


@pytest.mark.parametrize("make", [word_piece, metaspace])
@given(data=st.data())
def test_other_tokenizers_give_the_same_text_in_pieces(
    make: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    tokenizer = make()
    token_ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab + 1), max_size=12)
    )  # the last two have no token
    assert not tokenizer.is_byte_level
    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(text=st.text(alphabet="ab é世界🙂", max_size=12))
@example(text="世界")
@example(text="🙂🙂 🙂")
def test_characters_spelled_in_bytes_by_other_tokenizers_come_whole(text: str) -> None:
    assume(
        not text.startswith(" ")
    )  # what this kind of tokenizer puts in front of every text, and takes away again
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode(text.replace(" ", "▁"))
    assert tokenizer.decode(token_ids) == text
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_of_other_tokenizers_shows_at_the_end() -> None:
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode("a🙂")[:-1]
    assert pieces_of(tokenizer, token_ids)[:-1] == ["a", "", "", ""]
    assert "".join(pieces_of(tokenizer, token_ids)) == tokenizer.decode(token_ids)


# Stop strings -------------------------------------------------------------------------------------

SHORT_TEXTS = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)
CUT_TEXT = st.lists(st.text(alphabet="ab", max_size=4), max_size=8)


def slow_stop(
    text: str, stops: Sequence[str], *, include: bool, after: int = 0
) -> tuple[str, str | None]:
    """Return the text up to its first stop string.

    That is the one that ends first after `after` characters, and of those the longest.
    """
    for end in range(after + 1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def could_become_a_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


@given(pieces=CUT_TEXT, stops=STOPS, include=st.booleans())
@example(pieces=["abab"], stops=["abab", "ba"], include=False)
@example(pieces=["aa", "b"], stops=["aab", "ab"], include=False)
@example(pieces=["a", "", "a"], stops=["aa"], include=True)
def test_text_is_released_up_to_the_first_stop_however_it_is_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    watch = StopStrings(stops, include_in_output=include)
    expected, expected_stop = slow_stop("".join(pieces), stops, include=include)
    released, seen, stop = "", "", None
    for piece in pieces:
        text, stop = watch.push(piece)
        released, seen = released + text, seen + piece
        if stop is not None:
            break
        assert released == seen[: len(seen) - could_become_a_stop(seen, stops)], (
            "too much was released, or too little"
        )
    assert (released + watch.flush(), stop) == (expected, expected_stop)


@given(pieces=CUT_TEXT, stops=STOPS, protected=st.integers(0, 8), include=st.booleans())
@example(pieces=["ab", "x"], stops=["abc", "b"], protected=1, include=False)
@example(pieces=["aa", "a"], stops=["aa"], protected=1, include=False)
def test_a_stop_may_begin_in_protected_text_but_not_end_there(
    pieces: list[str], stops: list[str], protected: int, include: bool
) -> None:
    watch = StopStrings(stops, include_in_output=include)
    safe = len("".join(pieces[:protected]))
    released, stop = "", None
    for number, piece in enumerate(pieces):
        text, stop = watch.push(piece, may_stop=number >= protected)
        released += text
        if stop is not None:
            break
    assert (released + watch.flush(), stop) == slow_stop(
        "".join(pieces), stops, include=include, after=safe
    )


def test_without_stop_strings_nothing_is_held() -> None:
    watch = StopStrings([])
    assert watch.push("abc") == ("abc", None)
    assert watch.flush() == ""


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert StopStrings(["b", "ab"]).push("xab") == ("x", "ab")
    assert StopStrings(["ab", "b"], include_in_output=True).push("xabc") == ("xab", "ab")


def test_held_text_comes_out_once() -> None:
    watch = StopStrings(["\n\n"])
    assert watch.push("line\n") == ("line", None)
    assert watch.flush() == "\n"
    assert watch.flush() == ""


def test_no_stop_string_is_cut_into_by_a_multi_byte_character(tokenizer: Tokenizer) -> None:
    decoder, watch = IncrementalDecoder(tokenizer), StopStrings(["🙂!"])
    released = "".join(
        watch.push(decoder.push(token_id))[0]
        for token_id in byte_tokens(tokenizer, "a🙂?".encode())
    )
    assert released == "a🙂?"


def test_a_long_stop_string_holds_text_until_it_cannot_come_any_more() -> None:
    watch = StopStrings(["a" * 300 + "b", "c"])
    assert [watch.push("a") for _ in range(300)] == [("", None)] * 300
    assert watch.push("a") == ("a", None)
    assert watch.push("x") == ("a" * 300 + "x", None)
