"""StructuredOutputs: errors detected without compiling."""

from typing import Any

import pytest

from nanovllm import SamplingParams, StructuredOutputs
from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing but takes exactly one"),
        ({"regex": "a", "choice": ["b"]}, "regex, choice but takes exactly one"),
        ({"json_object": False}, "must be true"),
        ({"regex": ""}, "regex must be a text"),
        ({"grammar": 3}, "grammar must be a text"),
        ({"choice": []}, "list of texts"),
        ({"choice": "yes"}, "list of texts"),
        ({"choice": ["yes", ""]}, "none of them empty"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, f"limit is {MAX_CHOICES}"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[1]"}, "must be a JSON schema"),
        ({"json": {"a": object()}}, "cannot be written as JSON"),
        ({"regex": "a" * MAX_GRAMMAR_BYTES}, f"limit is {MAX_GRAMMAR_BYTES}"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
        ({"grammar": 'start: "\ud800"'}, "half of a surrogate pair"),
        ({"choice": ["a", "\udfff"]}, "half of a surrogate pair"),
        ({"json": {"const": "\ud800"}}, "half of a surrogate pair"),
        ({"json": {"minimum": 1 << 64}}, "more than 64 bits"),
        ({"json": '{"minimum": -' + "9" * 30 + "}"}, "more than 64 bits"),
        ({"json": {"minimum": float("nan")}}, "cannot be written as JSON"),
        ({"json": {}, "disable_additional_properties": 0}, "must be true or false"),
        ({"json": '{"items":' * 982 + "{}" + "}" * 982}, "not valid JSON"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        StructuredOutputs(**fields)
    assert caught.value.param == "structured_outputs"


def test_equal_wishes_have_equal_keys() -> None:
    assert (
        StructuredOutputs(json='{"type": "object"}').key
        == StructuredOutputs(json={"type": "object"}).key
    )
    assert StructuredOutputs(json={"type": "object"}).key != StructuredOutputs(json_object=True).key


def test_a_schema_is_copied() -> None:
    schema: dict[str, Any] = {"type": "object"}
    spec = StructuredOutputs(json=schema)
    schema["type"] = "array"
    assert spec.json == {"type": "object"}


@pytest.mark.parametrize("other", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_what_would_keep_an_answer_from_ending_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be combined with structured_outputs"):
        SamplingParams(structured_outputs=StructuredOutputs(regex="a"), **other)


def test_another_type_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be a StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
