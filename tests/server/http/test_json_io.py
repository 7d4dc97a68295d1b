"""JSON is read and written as by the standard library, within bounds and in small pieces."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server.http import json_io
from nanovllm.server.http.json_io import PIECE_ITEMS, json_pieces, read_json, write_json

PARTS = (
    "[", "]", "{", "}", ",", ":", '"', "\\", "1", "a", " ", '"a":', "[1,2]", '{"b":3}',
    '"x\\"y"', "\\\\", "null", "é",
)  # fmt: skip

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


def plain(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@given(VALUES)
def test_writing_agrees_with_json_dumps(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_io, "PIECE_ITEMS", 2)
        assert write_json(value) == plain(value)


def test_large_values_have_small_pieces() -> None:
    position = {
        str(token): {"logprob": -1.5, "rank": 1, "decoded_token": " the"} for token in range(21)
    }
    logprobs = {"tokens": ["a"] * 1024, "top_logprobs": [None, *[position] * 1023]}
    body = {
        "id": "x",
        "choices": [{"logprobs": logprobs, "prompt_logprobs": [None, *[position] * 1023]}],
        "data": [{"embedding": [0.123456789] * 768}] * 3,
    }
    pieces = list(json_pieces(body))
    assert b"".join(pieces) == plain(body)
    assert max(map(len, pieces)) <= PIECE_ITEMS * len(plain(position)) + 100


def test_json_has_neither_infinity_nor_nan() -> None:
    for number in (math.inf, math.nan):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json({"a": [number]})


def outcome(read: Any, document: bytes) -> tuple[Any, ...]:
    try:
        return "read", read(document)
    except ValueError:
        return ("refused",)


@given(VALUES, st.booleans(), st.integers(0, 100), st.sampled_from(PARTS), st.booleans())
def test_reading_agrees_with_json_loads(
    value: Any, is_ascii: bool, at: int, part: str, replaces: bool
) -> None:
    text, plain_text = (json.dumps(value, ensure_ascii=each) for each in (is_ascii, False))
    damaged = plain_text[:at] + part + plain_text[at + replaces :]
    for document in (text.encode(), damaged.encode(), b"\xef\xbb\xbf" + text.encode()):
        assert outcome(read_json, document) == outcome(json.loads, document), document


@pytest.mark.parametrize("block_bytes", [1, 7, 100_000])
def test_arrays_objects_and_fields_are_counted_outside_of_strings(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(json_io, "MAX_CONTAINERS", 1000)
    monkeypatch.setattr(json_io, "_BLOCK_BYTES", block_bytes)
    draw = random.Random(7)
    pieces = ("[{:", '\\"[', "\\\\", '\\\\\\"{', ":")
    filling = '"' + "".join(draw.choice(pieces) for _ in range(5000)) + '"'
    assert read_json(f"[{'[],' * 998}{filling}]".encode())[-1] == json.loads(filling)
    for part in ("{},", '{"a":1},'):
        with pytest.raises(ValueError, match="more than 1000 arrays, objects and fields"):
            read_json(f"[{part * 1000}{filling}]".encode())


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"[" * 202 + b"]" * 202, "recursion limit .* 200 levels deep"),
        (b"1" * 4301, "out of range .* 4300 digits"),
        (b'"\\ud800"', "surrogate pair"),
        (b'"\xff"', "line 1 column 2"),
        (b'{"a": 1,\n"b" 2}', "line 2 column 5"),
    ],
)
def test_a_document_that_cannot_be_read_is_described(document: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(document)


def test_the_limits_themselves_are_allowed() -> None:
    assert read_json(b"[" * 200 + b"]" * 200)
    assert read_json(b"1" * 4300) == int("1" * 4300)
    assert read_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert read_json(b"[1e999, -Infinity]") == [math.inf, -math.inf]
