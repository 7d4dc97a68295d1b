"""Numbers of JSON end after MAX_DIGITS digits in a row; all other texts are as they were."""

import json
import sys
from typing import Any

import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.sandbox.json_digits import MAX_DIGITS
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import accepts, check_texts

MOST = "1" * MAX_DIGITS
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LONG = 10 ** (MAX_DIGITS + 5)

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    # name: (schema, texts that it allows, texts that it does not)
    "integer": (
        {"type": "integer"},
        ["0", MOST, f"-{MOST}", str(2**63 - 1), str(-(2**63)), str(2**64 - 1)],
        [MOST + "1", f"-{MOST}1"],
    ),
    "integer of an object": (OBJECT, [f'{{"a": {MOST}}}'], [f'{{"a": {MOST}1}}']),
    "integers of a list": (
        {"type": "array", "items": {"type": "integer"}},
        [f"[{MOST}, {MOST}]"],
        [f"[{MOST}, {MOST}1]"],
    ),
    "number": (
        {"type": "number"},
        [f"{MOST}.{MOST}e-{MOST}", "6.02e+23", *map(repr, (sys.float_info.max, 5e-324, 1 / 3))],
        [f"{MOST}1", f"0.{MOST}1", f"1e{MOST}1"],
    ),
    "anything": ({}, [MOST, f'"{MOST}1"', f'{{"{MOST}1": "\\\\", "b": 1}}'], [MOST + "1"]),
    "text": (
        {"type": "string"},
        [json.dumps(f'{MOST}1"{MOST}1\\'), json.dumps("\\" + MOST * 2)],
        [],
    ),
    "a number that must be longer": (
        {"enum": [float(LONG), 1]},
        [str(LONG), "1"],
        [str(LONG // 10)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_end(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    schema, allowed, forbidden = CASES[name]
    check_texts(grammars, tokenizer, StructuredOutputs(json=schema), allowed, forbidden)


def test_numbers_of_any_object_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    spec = StructuredOutputs(json_object=True)
    check_texts(grammars, tokenizer, spec, [f'{{"a": {MOST}}}'], [f'{{"a": {MOST}1}}'])


def test_a_regular_expression_has_as_many_digits_as_it_says(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    assert accepts(grammars, tokenizer, StructuredOutputs(regex="[0-9]+"), MOST * 2)
