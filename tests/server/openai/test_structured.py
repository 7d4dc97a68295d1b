"""response_format and structured_outputs over HTTP, for completions and for chats."""

import json
from typing import Any

import pytest
from openai import OpenAI

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.errors import InvalidRequestError
from nanovllm.server.openai.schemas import CompletionRequest
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.serving import MODEL, RunningServer, read_error

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
}


@pytest.mark.parametrize(
    "fields",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            }
        },
        {"response_format": {"type": "json_object", "value": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}, "response_format": {"type": "text"}},
    ],
)
def test_a_schema_is_followed(client: OpenAI, fields: dict[str, Any]) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="the", max_tokens=60, seed=1, extra_body=fields
    )
    assert set(json.loads(completion.choices[0].text)) == {"ok"}
    assert completion.choices[0].finish_reason == "stop"


ONE_PROPERTY = {"type": "object", "properties": {}, "minProperties": 1}
"""No object satisfies it unless it may have properties that are not declared."""


def test_objects_can_have_the_standards_meaning(server: RunningServer) -> None:
    fields = {"json": ONE_PROPERTY, "disable_additional_properties": False}
    answer = server.complete("the", max_tokens=3, structured_outputs=fields)
    assert answer["choices"][0]["text"].startswith("{")


def test_a_choice_is_streamed(client: OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["red", "green"]}}
    with client.completions.create(
        model=MODEL, prompt="the", max_tokens=20, stream=True, extra_body=extra
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) in {"red", "green"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "value": SCHEMA}}, "response_format"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}},
            "response_format",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        (
            {
                "response_format": {"type": "text", "json_schema": {"schema": SCHEMA}},
                "structured_outputs": {"regex": "a"},
            },
            "response_format",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"shape": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    answer = server.post({"prompt": "the", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# Chats --------------------------------------------------------------------------------------------

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}", "test")
MESSAGES: list[Any] = [{"role": "user", "content": "the end"}]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"type": "json_object", "value": SCHEMA}, "response_format.value"),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_errors_of_a_schema_name_the_field_that_has_it(fields: dict[str, Any], name: str) -> None:
    body = CompletionRequest.model_validate({"prompt": "a", "response_format": fields})
    with pytest.raises(InvalidRequestError) as refused:
        StructuredOutputs(json="[")
    renamed = refused.value.named(body.field_names)
    assert renamed.param == "response_format"
    assert str(renamed).startswith(f"{name} is not valid JSON")
    assert str(refused.value).startswith("structured_outputs.json is not valid JSON")


@pytest.mark.parametrize("streams", [False, True])
def test_a_chat_follows_a_schema(chat_client: OpenAI, streams: bool) -> None:
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }
    settings: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 60,
        "seed": 1,
        "response_format": wanted,
    }
    if streams:
        with chat_client.chat.completions.create(**settings, stream=True) as chunks:
            pieces = [chunk.choices[0] for chunk in chunks]
        text, reason = (
            "".join(piece.delta.content or "" for piece in pieces),
            pieces[-1].finish_reason,
        )
    else:
        (choice,) = chat_client.chat.completions.create(**settings).choices
        text, reason = choice.message.content or "", choice.finish_reason
    assert set(json.loads(text)) == {"ok"}
    assert reason == "stop"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"choice": ["red", "green"]}, {"red", "green"}),
        ({"regex": "x{3}"}, {"xxx"}),
        ({"grammar": 'start: "x" "y"'}, {"xy"}),
        ({"grammar": 'root ::= a "y"\na ::= [x]'}, {"xy"}),
        ({"json": {"type": "object", "properties": {}}}, {"{}"}),
    ],
)
def test_a_chat_follows_every_form(
    chat_client: OpenAI, wanted: dict[str, Any], expected: set[str]
) -> None:
    extra = {"structured_outputs": wanted}
    answer = chat_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, n=2, extra_body=extra
    )
    assert {choice.message.content for choice in answer.choices} <= expected
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_chat_may_fill_the_context_with_json(chat_client: OpenAI) -> None:
    """Without max_tokens the answer ends with the object or with the context."""
    (choice,) = chat_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, seed=2, response_format={"type": "json_object"}
    ).choices
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "value": SCHEMA}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "nothing"}},
                }
            },
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= b"}}, "structured_outputs"),
        ({"structured_outputs": {"json": ONE_PROPERTY}}, "structured_outputs"),
        ({"structured_outputs": {"shape": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_a_chat_names_the_field_that_cannot_be(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "the"}),
    ):
        assert read_error(server.http.post(path, json={**body, **fields}), 400)["param"] == param
