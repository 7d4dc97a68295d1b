"""Outlines with its models for OpenAI, vLLM and SGLang."""

from typing import Literal

import openai
import outlines
from checks import MODEL, PROMPT, V1, refused, works
from outlines.types import CFG, Regex
from person import Person

client = openai.OpenAI(base_url=V1, max_retries=0)
by_openai = outlines.from_openai(client, MODEL)
by_vllm = outlines.from_vllm(client, MODEL)
by_sglang = outlines.from_sglang(client, MODEL)
EVERY = (by_openai, by_vllm, by_sglang)


@works
def text() -> None:
    for model in EVERY:
        assert model(PROMPT, max_tokens=8)


@works
def streams() -> None:
    for model in EVERY:
        assert "".join(model.stream(PROMPT, max_tokens=8))


@works
def json_schemas() -> None:
    for model in EVERY:
        Person.model_validate_json(model(PROMPT, Person, max_tokens=200))


@works
def a_choice() -> None:
    assert by_vllm(PROMPT, Literal["yes", "no"], max_tokens=8) in {"yes", "no"}


@works
def a_regular_expression() -> None:
    assert by_vllm(PROMPT, Regex("[a-c]{3}"), max_tokens=8).strip("abc") == ""


@works
def an_integer() -> None:
    assert int(by_vllm(PROMPT, int, max_tokens=64)) is not None


@works
def a_grammar() -> None:
    assert by_vllm(PROMPT, CFG('start: "x" | "y"'), max_tokens=8) in {"x", "y"}


@refused("SGLang's field `regex` is not vLLM's `structured_outputs`", naming="regex")
def a_regular_expression_of_sglang() -> None:
    by_sglang(PROMPT, Regex("[a-c]{3}"), max_tokens=8)
