"""Bytes of tokens, and UTF-8 in pieces."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from nanovllm.model.token_spelling import (
    Spelling,
    byte_level_spelling,
    find_spelling,
    strip_prefix,
)

BYTE_LEVEL, SENTENCE_PIECE = Spelling(), Spelling("▁", 1)
FALLBACK = (decoders.ByteFallback(), decoders.Fuse())
UNDERLINE = decoders.Replace("▁", " ")


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.ByteLevel(), BYTE_LEVEL),
        ([UNDERLINE, *FALLBACK, decoders.Strip(" ", 1, 0)], SENTENCE_PIECE),
        ([UNDERLINE, *FALLBACK], Spelling("▁", 0)),  # Gemma's
        ([decoders.Replace("__", " "), *FALLBACK, decoders.Strip(" ", 2, 0)], Spelling("__", 2)),
        ([UNDERLINE, *FALLBACK, decoders.Strip(" ", 1, 1)], None),
        ([UNDERLINE, *FALLBACK, decoders.Strip("x", 1, 0)], None),
        ([UNDERLINE, *FALLBACK, UNDERLINE], None),
        ([decoders.Replace("▁", "_"), *FALLBACK], None),
        ([*FALLBACK], None),
        (decoders.Metaspace(), None),
        (decoders.WordPiece(), None),
        (None, None),
    ],
)
def test_the_spelling_is_known_by_the_decoder(decoder: Any, expected: Spelling | None) -> None:
    library = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        library.decoder = decoders.Sequence(decoder) if isinstance(decoder, list) else decoder
    assert find_spelling(library) == expected


def test_tokens_spell_bytes() -> None:
    spelled = {
        "▁the": b" the", "a▁▁": b"a  ", "<0x0A>": b"\n", "<0xfF>": b"\xff", "<0x100>": b"<0x100>",
        "<0x0A>x": b"<0x0A>x", "Ġ": "Ġ".encode(),
    }  # fmt: skip
    assert {token: SENTENCE_PIECE.bytes_of(token) for token in spelled} == spelled
    assert BYTE_LEVEL.bytes_of("Ġthe") == b" the"
    assert BYTE_LEVEL.bytes_of("▁") == "▁".encode(), "a character that stands for no byte"
    assert BYTE_LEVEL.bytes_of(byte_level_spelling("é\n🙂".encode())) == "é\n🙂".encode()


PARTS = st.binary(max_size=3) | st.text(max_size=2).map(str.encode)


@pytest.mark.parametrize("spelling", [BYTE_LEVEL, SENTENCE_PIECE])
@given(parts=st.lists(PARTS, max_size=6))
@example(parts=[b"\xe4", b"\xb8", b"\x96\xff"])
@example(parts=[b"\xed\xa0", b"\x80"])
def test_pieces_of_bytes_decode_to_the_whole(spelling: Spelling, parts: Sequence[bytes]) -> None:
    whole = spelling.decode(b"".join(parts))
    decoder = spelling.utf8_decoder()
    released = ""
    for part in parts:
        pending, _ = decoder.getstate()
        peeked = spelling.decode(pending + part, is_whole=False)
        text = decoder.decode(part)
        assert text == peeked
        released += text
        assert whole.startswith(released)
    assert released + decoder.decode(b"", final=True) == whole


@given(data=st.binary(max_size=12))
@example(data=b"\xf0\x9f\x99a\xe4\xb8\x96")
def test_invalid_bytes_are_replaced(data: bytes) -> None:
    """One U+FFFD for each of them; byte-level, one for each beginning of a character."""
    valid = data.decode(errors="ignore")
    text = SENTENCE_PIECE.decode(data)
    assert text.replace("\ufffd", "") == valid.replace("\ufffd", "")
    num_invalid = len(data) - len(valid.encode())
    assert text.count("\ufffd") == num_invalid + valid.count("\ufffd")
    assert BYTE_LEVEL.decode(data) == data.decode(errors="replace")


@given(text=st.text("a ", max_size=6), cut=st.integers(0, 6), num_spaces=st.integers(0, 3))
def test_the_prefix_is_removed_in_pieces_as_at_once(text: str, cut: int, num_spaces: int) -> None:
    first, left = strip_prefix(text[:cut], num_spaces)
    second, _ = strip_prefix(text[cut:], left)
    assert first + second == strip_prefix(text, num_spaces)[0]
    assert text.endswith(first + second)
    removed = text[: len(text) - len(first + second)]
    assert len(removed) == min(num_spaces, len(text) - len(text.lstrip(" ")))
