"""Closed JSON schemas forbid undeclared properties, and allow all declared ones."""

import json
from copy import deepcopy
from typing import Any

import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.sandbox import json_schemas
from nanovllm.engine.sandbox.json_schemas import close_objects
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import accepts, check_texts

INTEGER = {"type": "integer"}
A = {"type": "object", "properties": {"a": INTEGER}}
B = {"type": "object", "properties": {"b": INTEGER}}

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    # name: (schema, texts that it allows, texts that it does not)
    "properties": (A, ["{}", '{"a": 1}'], ['{"b": 1}', '{"a": 1, "b": 1}']),
    "no properties": ({"type": "object"}, ["{}", '{"b": 1}'], []),
    "empty properties": ({"type": "object", "properties": {}}, ["{}"], ['{"b": 1}']),
    "pattern": (
        {"type": "object", "patternProperties": {"^x": INTEGER}},
        ["{}", '{"x1": 1}'],
        ['{"b": 1}'],
    ),
    "explicit": ({**A, "additionalProperties": True}, ['{"a": 1, "b": 1}'], []),
    "explicit schema": (
        {**A, "additionalProperties": INTEGER},
        ['{"a": 1, "b": 1}'],
        ['{"b": "x"}'],
    ),
    "nested": (
        {"type": "object", "properties": {"o": A}, "required": ["o"]},
        ['{"o": {"a": 1}}'],
        ['{"o": {"b": 1}}', '{"o": {}, "b": 1}'],
    ),
    "required by another part": (
        {"allOf": [A, {"required": ["b"]}]},
        ['{"a": 1, "b": 1}', '{"b": 1}'],
        ['{"a": 1}'],
    ),
    "one of two is required": (
        {**A, "anyOf": [{"required": ["a"]}]},
        ['{"a": 1}'],
        ["{}", '{"a": 1, "b": 1}', '{"b": 1}'],
    ),
    "array": ({"type": "array", "items": A}, ['[{"a": 1}, {}]'], ['[{"b": 1}]']),
    "tuple": ({"type": "array", "prefixItems": [A]}, ['[{"a": 1}]'], ['[{"b": 1}]']),
    "map": (
        {"type": "object", "additionalProperties": A},
        ['{"k": {"a": 1}}'],
        ['{"k": {"b": 1}}'],
    ),
    "anyOf": (
        {"anyOf": [A, {"type": "null"}, {"anyOf": [B]}]},
        ['{"a": 1}', "null", '{"b": 1}'],
        ['{"c": 1}', '{"a": 1, "b": 1}'],
    ),
    "reference": (
        {"$defs": {"A": A}, "type": "object", "properties": {"o": {"$ref": "#/$defs/A"}}},
        ['{"o": {"a": 1}}'],
        ['{"o": {"b": 1}}'],
    ),
    "recursion": (
        {
            "$ref": "#/$defs/N~1",
            "$defs": {
                "N/": {"type": "object", "properties": {"n": {"$ref": "#/$defs/N~1"}}},
            },
        },
        ['{"n": {"n": {}}}'],
        ['{"n": {"b": 1}}'],
    ),
    "one allOf": ({"title": "t", "allOf": [A]}, ['{"a": 1}'], ['{"b": 1}']),
    "required only": (
        {**A, "required": ["a", "c"]},
        ['{"a": 1, "c": null}'],
        ['{"a": 1}', '{"a": 1, "c": 1, "d": 1}'],
    ),
    "alternatives of required": (
        {
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        ['{"a": 1}', '{"b": 1}'],
        ["{}", '{"a": 1, "c": 1}'],
    ),
    # Closing one part of these would forbid what the other declares.
    "allOf": (
        {"allOf": [{**A, "required": ["a"]}, {**B, "required": ["b"]}]},
        ['{"a": 1, "b": 1}'],
        ['{"a": 1}'],
    ),
    "allOf of references": (
        {
            "$defs": {"A": {**A, "required": ["a"]}},
            "allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": A}, "required": ["b"]}],
        },
        ['{"a": 1, "b": {"a": 1}}'],
        ['{"a": 1}', '{"a": 1, "b": {"c": 1}}'],
    ),
    "reference beside properties": (
        {"$defs": {"A": A}, "$ref": "#/$defs/A", **B, "required": ["b"]},
        ['{"a": 1, "b": 1}'],
        ['{"a": "x", "b": 1}'],
    ),
    "anyOf beside properties": (
        {**A, "anyOf": [{**B, "required": ["b"]}, {"properties": {"c": INTEGER}}]},
        ['{"a": 1, "b": 1}', '{"a": 1, "c": 1}'],
        ['{"a": "x"}'],
    ),
    "properties called as keywords": (
        {"type": "object", "properties": {"properties": A, "allOf": B}},
        ['{"properties": {"a": 1}, "allOf": {"b": 1}}'],
        ['{"properties": {"b": 1}}'],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_undeclared_properties_are_not_allowed(
    grammars: Grammars, tokenizer: Tokenizer, name: str
) -> None:
    schema, allowed, forbidden = CASES[name]
    check_texts(grammars, tokenizer, StructuredOutputs(json=schema), allowed, forbidden)


def test_the_standards_meaning_can_be_asked_for(grammars: Grammars, tokenizer: Tokenizer) -> None:
    closed = StructuredOutputs(json=A)
    standard = StructuredOutputs(json=A, disable_additional_properties=False)
    assert closed.key != standard.key
    assert accepts(grammars, tokenizer, standard, '{"a": 1, "b": 1}')
    assert not accepts(grammars, tokenizer, closed, '{"a": 1, "b": 1}')


def test_any_object_stays_any_object(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert accepts(grammars, tokenizer, StructuredOutputs(json_object=True), '{"b": {"c": []}}')


def test_conditions_and_values_are_not_changed() -> None:
    """Closing the objects of a condition would change what it asks."""
    schema: dict[str, Any] = {
        "not": A,
        "if": A,
        "contains": A,
        "propertyNames": A,
        "const": A,
        "enum": [A],
        "default": A,
        "items": True,
    }
    expected = deepcopy(schema)
    close_objects(schema)
    assert schema == expected


def test_references_that_lead_nowhere_are_left_to_the_library() -> None:
    for reference in ("#/nowhere", "#/allOf/7/a", "#/allOf/x", "https://x.y/z", 3):
        schema = {"allOf": [{"$ref": reference}, deepcopy(A)]}
        close_objects(schema)
        assert schema["allOf"][1]["additionalProperties"] is False  # type: ignore[index]


def test_a_schema_that_combines_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_schemas, "MAX_STEPS", 1000)
    reference = {"$ref": "#/$defs/all"}
    schema = {"$defs": {"all": {"anyOf": [{"type": "null"}] * 40}}, "anyOf": [reference] * 40}
    copy = json.loads(json.dumps(schema))  # no object occurs twice
    with pytest.raises(ValueError, match="the schema combines its parts in more than 1000 ways"):
        close_objects(copy)
