"""Accepted bodies: nulls, integral floats, ignored fields, and clients' messages."""

import json
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel

from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.body import check_body, parse_body
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.embeddings import EmbeddingRequest
from nanovllm.server.openai.response_schemas import InputMessage, ResponsesRequest
from nanovllm.server.openai.schemas import CompletionRequest, SamplingBody
from nanovllm.server.openai.tokenization import DetokenizeRequest, TokenizeRequest
from tests.support.serving import MODEL, RunningServer, read_error

MESSAGE = {"role": "user", "content": "a"}
REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    ChatRequest: {"messages": [MESSAGE]},
    ResponsesRequest: {"input": "a"},
    EmbeddingRequest: {"input": "a"},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
}
INTEGERS = ("max_tokens", "n", "seed", "top_k", "min_tokens", "priority")


@pytest.mark.parametrize("kind", REQUIRED, ids=lambda kind: kind.__name__)
def test_null_means_left_out_for_every_field_known_and_unknown(kind: type[BaseModel]) -> None:
    required = REQUIRED[kind]
    nulls = dict.fromkeys([*(name for name in kind.model_fields if name not in required), "new"])
    assert check_body({**required, **nulls}, kind) == check_body(required, kind)
    for name in (name for name in required if kind.model_fields[name].is_required()):
        with pytest.raises(InvalidRequestError, match=f"{name}: must be .*given: null"):
            check_body({name: None}, kind)
    with pytest.raises(InvalidRequestError, match="new: not supported"):
        check_body({**required, "new": 0}, kind)


def test_null_means_left_out_inside_of_objects() -> None:
    body = {
        "messages": [
            {**MESSAGE, "name": None, "new": None},
            {"role": "user", "content": [{"type": "text", "text": "b", "cache": None}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": None, "new": None},
        "response_format": {"type": "text", "json_schema": None, "new": None},
        "structured_outputs": {"regex": "a", "json": None, "new": None},
    }
    checked = check_body(body, ChatRequest)
    assert [message.content for message in checked.messages] == ["a", "b"]
    assert checked.stream_options is not None
    assert not checked.stream_options.include_usage


def test_a_schema_that_answers_follow_keeps_its_nulls_and_floats() -> None:
    schema = {"enum": [None, 1.0], "default": None, "maximum": 5.0}
    checked = check_body({"prompt": "a", "structured_outputs": {"json": schema}}, CompletionRequest)
    assert checked.structured_outputs is not None
    assert json.dumps(checked.structured_outputs.json_) == json.dumps(schema)


def test_a_float_without_a_fraction_is_an_integer_in_every_field_of_integers() -> None:
    whole = check_body({**dict.fromkeys(INTEGERS, 7), "prompt": [1, 2]}, CompletionRequest)
    floats = check_body({**dict.fromkeys(INTEGERS, 7.0), "prompt": [1.0, 2]}, CompletionRequest)
    assert json.dumps(floats.model_dump()) == json.dumps(whole.model_dump())
    lists = {"stop_token_ids": [3.0], "allowed_token_ids": [4, 5.0], "prompt": [[1.0], [2]]}
    checked = check_body(lists, CompletionRequest)
    found = [checked.stop_token_ids, checked.allowed_token_ids, checked.prompt]
    assert json.dumps(found) == "[[3], [4, 5], [[1], [2]]]"
    assert json.dumps(check_body({"tokens": [1.0]}, DetokenizeRequest).tokens) == "[1]"
    for name in INTEGERS:
        with pytest.raises(InvalidRequestError, match=f"{name}: must be an integer"):
            check_body({"prompt": "a", name: 5.5}, CompletionRequest)


def test_extra_fields_of_an_assistant_message_are_accepted() -> None:
    answer: dict[str, Any] = {
        "role": "assistant", "content": "b", "refusal": "no", "annotations": [],
        "audio": {"id": "x"}, "function_call": None, "tool_calls": [], "reasoning_content": "c",
        "reasoning": "d", "provider_specific_fields": {"refusal": None}, "tool_call_id": None,
        "images": [],
    }  # fmt: skip
    checked = check_body({"messages": [MESSAGE, answer, MESSAGE]}, ChatRequest)
    assert checked.messages[1].model_dump(exclude_none=True) == {
        "role": "assistant",
        "content": "b",
    }
    for content in ({"content": None}, {}):
        empty = {"role": "assistant", "tool_calls": None, **content}
        (message,) = check_body({"messages": [empty]}, ChatRequest).messages
        assert message.content == ""
    wrongs: list[Any] = [[{"id": "1"}], {}, False, "x"]
    for wrong in wrongs:
        with pytest.raises(InvalidRequestError, match="tool_calls is not supported"):
            check_body({"messages": [{**answer, "tool_calls": wrong}]}, ChatRequest)


def test_keys_of_a_message_without_effect_are_accepted() -> None:
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "content": [part], "id": "msg_1"}
    (checked,) = check_body({"messages": [message]}, ChatRequest).messages
    assert checked.model_dump(exclude_none=True) == {"role": "user", "content": "a"}
    item = {**message, "content": [{**part, "type": "input_text"}], "status": "completed"}
    (checked_item,) = check_body({"input": [item]}, ResponsesRequest).input
    assert isinstance(checked_item, InputMessage)
    assert checked_item.content == "a"
    with pytest.raises(InvalidRequestError, match="status: not supported"):
        check_body({"messages": [{**message, "status": "completed"}]}, ChatRequest)


def test_fields_of_openai_that_change_nothing_are_accepted(
    server: RunningServer, client: OpenAI
) -> None:
    unused: dict[str, Any] = {
        "store": False, "metadata": {"run": "7"}, "service_tier": "default",
        "safety_identifier": "u", "prompt_cache_key": "k", "user": "u", "suffix": "",
        "prompt_cache_retention": "in_memory",
    }  # fmt: skip
    settings: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    expected = server.complete("the", **settings)["choices"][0]["text"]
    answer = client.completions.create(model=MODEL, prompt="the", **settings, extra_body=unused)
    assert answer.choices[0].text == expected
    searched = server.complete("the", max_tokens=2, use_beam_search=True, echo=None, **unused)
    assert len(searched["choices"]) == 1


def test_nulls_and_whole_floats_are_accepted_over_http(server: RunningServer) -> None:
    nulls = dict.fromkeys([*SamplingBody.model_fields, "new", "suffix"])
    body = {**nulls, "max_tokens": 5.0, "n": 2.0, "temperature": 0, "seed": 3.0}
    assert len(server.complete([116.0, 104], **body)["choices"]) == 2
    assert server.http.post("/detokenize", json={"tokens": [71.0], "new": None}).status_code == 200


@pytest.mark.parametrize("kind", [k for k in REQUIRED if "metadata" in k.model_fields])
@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ("NaN", "NaN or infinity"),
        ("-Infinity", "NaN or infinity"),
        ("[{}, [1e999]]", "NaN or infinity"),
    ],
)
def test_what_json_cannot_express_is_refused_in_objects_of_any_fields(
    kind: type[BaseModel], item: str, fault: str
) -> None:
    body = f'{json.dumps(REQUIRED[kind])[:-1]}, "metadata": {{"a": {item}}}}}'
    with pytest.raises(InvalidRequestError, match=f"metadata: has .*{fault}") as refused:
        parse_body(body.encode(), "application/json", kind)
    assert refused.value.param == "metadata"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_never_echoes_what_json_cannot_express(
    server: RunningServer, *, stream: bool
) -> None:
    schema = {"a": float("inf")}
    formats = {"format": {"type": "text", "schema": schema}}
    for name, fields in (("metadata", {"metadata": schema}), ("text", {"text": formats})):
        content = json.dumps({"input": "a", "stream": stream, **fields}).encode()
        headers = {"content-type": "application/json"}
        response = server.http.post("/v1/responses", content=content, headers=headers)
        assert read_error(response, 400)["param"] == name
