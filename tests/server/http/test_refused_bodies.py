"""Bodies that cannot be read or are too large for a model: small answers, without much work."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.server.http import validation_errors
from tests.support.serving import RunningServer, read_error

LONGEST_ANSWER_BYTES = 6000


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "JSON object"),
    "a list": (b"[]", "JSON object"),
    "a list of requests": (b'[{"prompt": "a"}]', "JSON object"),
    "null": (b"null", "JSON object"),
    "a form": (b"prompt=x", "line 1 column 1"),
    "a text": (b'"prompt"', "JSON object"),
    "cut off": (b'{"prompt": "a', "cannot be read as JSON"),
    "single quotes": (b"{'prompt': 'a'}", "line 1 column 2"),
    "something after it": (b'{"prompt": "a"} x', "cannot be read as JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', "cannot be read"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "finite"),
    "infinity": (
        b'{"prompt": "a", "top_p": Infinity}', "must be a finite number (given: Infinity)",
    ),
    "minus infinity": (b'{"prompt": "a", "logit_bias": {"1": -Infinity}}', "finite"),
    "not a number among the ids": (b'{"prompt": [NaN]}', "list"),
    "too large for a float": (
        b'{"prompt": "a", "temperature": 1e999}', "must be a finite number (given: Infinity)",
    ),
    "an integer of too many digits": (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "digits"),
    "nested a hundred thousand times": (
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "arrays, objects",
    ),
    "nested a thousand times": (
        b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", "nested 200 levels",
    ),
    "half a surrogate pair": (b'{"prompt": "a\\ud800"}', "surrogate pair"),
    "half a surrogate pair in a name": (b'{"\\udc00": 1}', "surrogate pair"),
    "nested a hundred times": (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "prompt"),
    "objects nested a hundred times": (
        b'{"prompt": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}", "prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_cannot_be_read_is_refused(server: RunningServer, name: str) -> None:
    content, part = BAD_BODIES[name]
    response = server.post(content)
    assert part in read_error(response, 400)["message"]
    assert len(response.content) < LONGEST_ANSWER_BYTES


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "nonsense",
        "",
    ],
)
def test_another_content_type_is_refused_with_the_right_one(
    server: RunningServer, content_type: str
) -> None:
    response = server.http.post(
        "/v1/completions", content=b"prompt=x", headers={"content-type": content_type}
    )
    message = read_error(response, 400)["message"]
    given = f"Content-Type: {content_type}" if content_type else "no Content-Type"
    assert message.endswith(f"sent with Content-Type: application/json (given: {given})")


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"],
)
def test_forms_of_the_content_type_are_understood(server: RunningServer, content_type: str) -> None:
    assert (
        server.post({"prompt": "a", "max_tokens": 1}, **{"content-type": content_type}).status_code
        == 200
    )


def test_a_text_that_is_far_too_long_is_refused_before_it_is_tokenized(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", None)
    response = server.post({"prompt": "the " * 500_000})
    assert "128" in read_error(response, 400)["message"]
    assert len(response.content) < 1000


def test_more_answers_than_may_wait_are_refused_before_they_are_made(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InputProcessor, "process", None)
    error = server.error({"prompt": ["a"] * 100_000, "n": 128})
    assert "12800000" in error["message"]
    assert "1024" in error["message"]


LARGE = "x" * 1_000_000
FLOODS: dict[str, dict[str, Any]] = {
    "a field's value": {"temperature": LARGE},
    "a field's name": {LARGE: 1},
    "a model's name": {"model": LARGE},
    "a request's id": {"request_id": LARGE + "\n"},
    "a salt": {"cache_salt": LARGE},
    "a token id": {"logit_bias": {LARGE: 1}},
    "a bias": {"logit_bias": {"1": LARGE}},
    "an unknown field's value": {"unknown": [[LARGE]] * 3},
    "quotes": {"temperature": "'\"\\" * 300_000},
    "half characters": {"temperature": "\ud800" * 100_000},
    "many bad stops": {"stop": [1] * 600_000},
    "many bad stop tokens": {"stop_token_ids": ["x"] * 400_000},
    "many bad words of another type": {"bad_words": [[]] * 400_000},
    "many tokens outside the vocabulary": {"allowed_token_ids": [300] * 400_000},
    "many unknown fields": {f"k{i}": 0 for i in range(200_000)},
    "many unknown stream options": {
        "stream": True, "stream_options": {f"k{i}": 0 for i in range(200_000)},
    },
    "many unknown structured outputs": {"structured_outputs": {f"k{i}": 0 for i in range(200_000)}},
    "many unknown fields of a format": {
        "response_format": {"type": "text", **{f"k{i}": 0 for i in range(200_000)}},
    },
    "many bad choices": {"structured_outputs": {"choice": [1] * 600_000}},
    "many bad biases": {"logit_bias": {str(i): "x" for i in range(200_000)}},
    "many prompts of the wrong kind": {"prompt": [["x"]] * 300_000},
    "many prompts, the last of the wrong kind": {"prompt": [1] * 400_000 + ["x"]},
    "lists in lists": {"prompt": json.loads("[" * 500 + "]" * 500)},
    "objects in objects": {"user": json.loads('{"a":' * 400 + "1" + "}" * 400)},
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_a_large_mistake_gets_a_small_answer_with_little_work(
    server: RunningServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe, described = validation_errors._describe, list[object]()  # noqa: SLF001

    def count(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
        described.append(problem)
        return describe(problem, kind)

    monkeypatch.setattr(validation_errors, "_describe", count)
    content = json.dumps({"prompt": "a", **FLOODS[name]}).encode()
    response = server.post(content)
    read_error(response, 404 if name == "a model's name" else 400)
    assert len(response.content) < LONGEST_ANSWER_BYTES


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text("\ud800\udfff\x00", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
field_names = st.sampled_from([
    "prompt", "model", "max_tokens", "temperature", "top_p", "n", "best_of", "logprobs", "echo",
    "stop", "presence_penalty", "logit_bias", "seed", "stream_options", "suffix", "user", "top_k",
    "stop_token_ids", "min_tokens", "bad_words", "allowed_token_ids", "skip_special_tokens",
    "prompt_logprobs", "priority", "cache_salt", "request_id", "truncate_prompt_tokens",
    "add_special_tokens", "return_token_ids", "return_tokens_as_token_ids", "truncation_side",
])  # fmt: skip


@given(fields=st.dictionaries(field_names | st.text(max_size=5), json_values, max_size=4))
@settings(max_examples=150)
def test_any_body_gets_a_completion_or_an_error_in_the_format(
    server: RunningServer, fields: dict[str, Any]
) -> None:
    response = server.post({"prompt": "a", "max_tokens": 2, **fields})
    if response.status_code == 200:
        assert response.json()["object"] == "text_completion"
    else:
        read_error(
            response,
            404
            if "model" in fields
            and isinstance(fields["model"], str)
            and response.status_code == 404
            else 400,
        )


def test_a_body_of_a_million_lists_is_refused_unread(server: RunningServer) -> None:
    """Reading them would take a second, in which nothing else could happen."""
    for part in (b"[],", b"[[[[]]]],", b'{"a":{}},'):
        content = b'{"prompt": "a", "user": [' + part * (3_900_000 // len(part)) + b"0]}"
        assert (
            "more than 65536 arrays, objects and fields"
            in read_error(server.post(content), 400)["message"]
        )


def test_a_thousand_prompts_of_token_ids_are_read(server: RunningServer) -> None:
    prompts = [[i % 250] * 120 for i in range(1024)]
    assert len(json.dumps(prompts)) > 1 << 18
    error = server.error({"prompt": prompts, "n": 2})
    assert "asks for 2048 choices" in error["message"]
