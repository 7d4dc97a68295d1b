"""Untrusted text in messages is escaped and cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import printable


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
