"""Structured outputs of a real engine follow their grammar, and do not depend on the batch."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams, StructuredOutputs
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.errors import InvalidRequestError
from tests.support.serving import ENGINE_SETTINGS

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
}
SPECS: dict[str, dict[str, Any]] = {
    "regex": {"regex": "[ab]{3}-[0-9]{2}"},
    "choice": {"choice": ["yes", "no", 'perhaps "so"\n']},
    "json": {"json": SCHEMA},
    "grammar": {"grammar": 'start: "x" ("," "x")* "."'},
    "gbnf": {"grammar": 'root ::= [a-c]{1,4} "b"'},
}


def follows(name: str, text: str) -> bool:
    if name == "json":
        person = json.loads(text)
        return (
            set(person) == {"name", "age"}
            and isinstance(person["name"], str)
            and 0 <= person["age"] <= 99
        )
    patterns = {
        "regex": r"[ab]{3}-[0-9]{2}",
        "choice": r'yes|no|perhaps "so"\n',
        "grammar": r"x(,x)*\.",
        "gbnf": r"[a-c]{1,4}b",
    }
    return re.fullmatch(patterns[name], text) is not None


@pytest.fixture(scope="module")
def llm(tiny_model: Path, backend: str) -> LLM:
    return LLM(tiny_model, **ENGINE_SETTINGS)


def params(name: str, seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{
            "max_tokens": 100,
            "seed": seed,
            "structured_outputs": StructuredOutputs(**SPECS[name]),
            **changes,
        }
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_end_follow_their_grammar(llm: LLM, name: str, temperature: float) -> None:
    outputs = llm.generate(
        ["the", "a cat"],
        [params(name, seed, temperature=temperature) for seed in (1, 2)],
        use_tqdm=False,
    )
    for output in outputs:
        (answer,) = output.outputs
        assert answer.finish_reason == "stop" or name == "grammar", "only this one has no limit"
        if answer.finish_reason == "stop":
            assert follows(name, answer.text), answer.text


def test_a_mixed_batch_gives_each_what_it_gets_alone(llm: LLM) -> None:
    settings = [params(name, seed, max_tokens=24) for seed in (1, 2) for name in SPECS] + [
        SamplingParams(seed=3),
        SamplingParams(temperature=0, logprobs=2),
    ]
    prompts = ["in the end"] * len(settings)
    together = llm.generate(prompts, settings, use_tqdm=False)
    alone = [
        llm.generate(prompt, one, use_tqdm=False)[0]
        for prompt, one in zip(prompts, settings, strict=True)
    ]
    assert [output.outputs for output in together] == [output.outputs for output in alone]


def test_each_of_n_answers_goes_its_own_way(llm: LLM) -> None:
    (output,) = llm.generate("the", params("regex", 5, n=6), use_tqdm=False)
    texts = [answer.text for answer in output.outputs]
    assert all(follows("regex", text) for text in texts)
    assert len(set(texts)) > 1


def test_other_settings_hold_too(llm: LLM) -> None:
    banned = llm.tokenizer.encode("a", add_special_tokens=False)
    (output,) = llm.generate(
        "the",
        params("regex", 1, logit_bias=dict.fromkeys(banned, -100.0), temperature=0.2),
        use_tqdm=False,
    )
    assert follows("regex", output.outputs[0].text)
    allowed = sorted(
        {
            token
            for text in ("b", "-", "0", "1")
            for token in llm.tokenizer.encode(text, add_special_tokens=False)
        }
    )
    end = list(llm.engine.model.eos_token_ids)
    (output,) = llm.generate(
        "the", params("regex", 1, allowed_token_ids=allowed + end), use_tqdm=False
    )
    assert re.fullmatch("b{3}-[01]{2}", output.outputs[0].text)


def test_a_preempted_answer_keeps_its_place(tiny_model: Path, backend: str) -> None:
    roomy, tight = (
        LLM(tiny_model, **{**ENGINE_SETTINGS, "num_blocks": blocks, "block_size": 4})
        for blocks in (400, 28)
    )
    settings = [params("json", seed, max_tokens=36) for seed in range(6)]
    expected = roomy.generate(["the"] * 6, settings, use_tqdm=False)
    outputs = tight.generate(["the"] * 6, settings, use_tqdm=False)
    assert [output.outputs for output in outputs] == [output.outputs for output in expected]
    assert tight.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "("},
        {"grammar": "start: nothing"},
        {"grammar": "root ::= nothing"},
        {"json": {"type": "no type"}},
    ],
)
def test_an_invalid_grammar_is_refused(llm: LLM, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs cannot be used"):
        llm.generate(
            "the", SamplingParams(structured_outputs=StructuredOutputs(**fields)), use_tqdm=False
        )


def test_an_object_has_no_other_properties(llm: LLM) -> None:
    """With open objects, greedy sampling would add properties until max_tokens."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
    params = SamplingParams(
        temperature=0, max_tokens=60, structured_outputs=StructuredOutputs(json=schema)
    )
    for output in llm.generate(["the", "a cat"], params, use_tqdm=False):
        assert output.outputs[0].finish_reason == "stop"
        assert json.loads(output.outputs[0].text).keys() <= {"ok"}


def test_equal_grammars_are_compiled_once(llm: LLM) -> None:
    grammars = Grammars(llm.tokenizer, llm.engine.model.vocab, llm.engine.model.eos_token_ids)
    first, second = (
        grammars.for_request(StructuredOutputs(regex="ab"), client).start() for client in "xy"
    )
    allowed = first.allowed_mask()
    assert second.allowed_mask().tolist() == allowed.tolist()
    assert second.pooled is first.pooled
    second.accept(int(np.flatnonzero(allowed)[0]))
    assert not np.array_equal(second.allowed_mask(), allowed)
    grammars.close()
