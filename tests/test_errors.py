"""Settings have the names of an interface; untrusted text in messages is escaped and cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import ContextLengthError, InvalidRequestError, counted, printable, setting


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("gpt2", "gpt2"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\r\nlines", "two\\r\\nlines"),
        ("\x9b31m", "\\x9b31m"),
        ("right\u202eleft", "right\\u202eleft"),
        ("\ud800", "\\ud800"),
        ("größe 模型", "größe 模型"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_text_is_cut() -> None:
    assert printable("a" * 200) == "a" * 200
    assert printable("a" * 201) == "a" * 200 + "..."
    assert printable("\x1b" * 10**6, limit=8) == "\\x1b\\x1b..."


@given(st.text(), st.integers(0, 50))
def test_the_result_is_printable_and_short(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 3
    shown.encode("utf-8")


def test_an_interface_has_names_of_its_own_for_settings() -> None:
    error = ContextLengthError(
        f"{setting('max_tokens')} is 9, not the word max_tokens",
        param="max_tokens",
        remedy=f"lower {setting('max_tokens')}",
    )
    assert str(error) == "max_tokens is 9, not the word max_tokens; lower max_tokens"
    renamed = error.at("prompt 3").named({"max_tokens": "limit"})
    assert str(renamed) == "prompt 3: limit is 9, not the word max_tokens; lower limit"
    assert (type(renamed), renamed.param) == (ContextLengthError, "limit")
    assert InvalidRequestError("a").named({"max_tokens": "limit"}).param is None


def test_one_thing_is_not_in_the_plural() -> None:
    assert [counted(count, "token") for count in (0, 1, 1200)] == [
        "0 tokens",
        "1 token",
        "1,200 tokens",
    ]
