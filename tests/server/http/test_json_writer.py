"""Writing JSON in pieces agrees with json.dumps, without holding the GIL for long."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.server.http import json_writer
from nanovllm.server.http.json_writer import PIECE_ITEMS, json_pieces, write_json

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
def test_it_agrees_with_json_dumps(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_writer, "PIECE_ITEMS", 2)
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
