"""response_format and structured_outputs over HTTP."""

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.support.serving import MODEL, RunningServer

pytest.importorskip("llguidance", reason="needs the extra `structured`")

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}, "response_format": {"type": "text"}},
    ],
)
def test_a_schema_is_followed(client: OpenAI, fields: dict[str, Any]) -> None:
    completion = client.completions.create(model=MODEL, prompt="the", max_tokens=60, seed=1, extra_body=fields)
    assert set(json.loads(completion.choices[0].text)) == {"ok"}
    assert completion.choices[0].finish_reason == "stop"


def test_a_choice_is_streamed(client: OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["red", "green"]}}
    with client.completions.create(model=MODEL, prompt="the", max_tokens=20, stream=True, extra_body=extra) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) in {"red", "green"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"shape": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    answer = server.post({"prompt": "the", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
