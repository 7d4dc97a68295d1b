"""Drafts under a grammar: the bits of a run without them, in fewer steps."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.config import BACKENDS, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.speculation import speculator
from nanovllm.engine.speculation.cost_model import Offer, best_counts
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative_config import SpeculativeConfig
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import children_of
from tests.support.processing import process
from tests.support.speculation import draft_always

EXACT = EngineConfig(
    batch_invariant=True, block_size=8, num_blocks=96, max_num_batched_tokens=64, max_num_seqs=8,
    num_threads=1,
)  # fmt: skip
PROMPT = tuple(b'the name "the name" and the age 12, the age 34')


def person(**more: Any) -> dict[str, Any]:
    properties = {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "occupation": {"enum": ["sailor", "sailmaker", None]},
        **more,
    }
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


PERSON = {"json": person()}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: grammar, settings of a request
    "a schema, greedy": (PERSON, {"temperature": 0.0}),
    "a schema, sampled": (PERSON, {"seed": 4, "n": 2}),
    "a schema that ends early": (PERSON, {"max_tokens": 9}),
    "penalties": (PERSON, {"repetition_penalty": 1.4, "frequency_penalty": 0.3}),
    "biases": (PERSON, {"logit_bias": {32: 3.0, 77: -5.0}, "top_k": 9}),
    "bad words": (PERSON, {"bad_words": ["me", "ag", "cu"], "temperature": 0.0}),
    "a list": (
        {"json": {"type": "array", "items": person(), "minItems": 2, "maxItems": 2}},
        {"temperature": 0.0, "max_tokens": 130},
    ),
    "choice": ({"choice": ["the name is", "the names are", "nothing"]}, {"top_p": 0.9}),
    "allowed": ({"regex": "[abc]{20}"}, {"allowed_token_ids": [*b"bc", 64, 65, 66, 67]}),
    "regex": ({"regex": "(the name, ){3}[ab]{4}(the age){2}"}, {"seed": 8}),
    "no other choice": ({"regex": "z{30}"}, {"max_tokens": 30}),
    "stop": ({"regex": "(the name, )*x"}, {"stop": ["me, the"]}),
    "no grammar": ({}, {"max_tokens": 20, "ignore_eos": True}),
    "switched off": (PERSON, {"speculative": False}),
}


def params(grammar: dict[str, Any], changes: dict[str, Any]) -> SamplingParams:
    defaults = {"max_tokens": 60, "seed": 3, "logprobs": 2}
    spec = StructuredOutputs(**grammar) if grammar else None
    return SamplingParams(**{**defaults, **changes}, structured_outputs=spec)


def run(
    engine: Engine, names: list[str], on_step: Callable[[int], None] = lambda number: None
) -> list[object]:
    """Return the bits of the outputs of some cases, run at once."""
    prepared = [
        process(engine.input_processor, f"{index}", list(PROMPT), params(*CASES[name]))
        for index, name in enumerate(names)
    ]
    for number, _ in enumerate(engine.run(prepared)):
        engine.check_integrity()
        on_step(number)
    assert engine.blocks.num_used == 0
    return [
        [
            (each.token_ids, each.logprobs, each.cumulative_logprob, each.finish_reason, each.text)
            for each in prompt.output().outputs
        ]
        for prompt in prepared
    ]


def load(
    folder: Path, config: EngineConfig, count: int | None, *, has_model: bool = False
) -> Engine:
    """Load an engine that drafts up to `count` tokens as if rows were free; None for no drafts.

    It drafts by n-grams, and where it `has_model`, by the model itself too.
    """
    speculative = (
        None
        if count is None
        else SpeculativeConfig(
            method="ngram",
            model=str(folder) if has_model else None,
            num_speculative_tokens=count,
            prompt_lookup_min=1,
        )
    )
    return draft_always(Engine.load(folder, replace(config, speculative_config=speculative)))


@pytest.fixture(scope="module", params=BACKENDS)
def exact(request: pytest.FixtureRequest) -> EngineConfig:
    return replace(EXACT, backend=request.param)


@pytest.fixture(scope="module")
def plain(exact: EngineConfig, tiny_model: Path) -> Iterator[dict[str, object]]:
    """What each case gives without drafts, alone."""
    engine = load(tiny_model, exact, None)
    yield {name: run(engine, [name])[0] for name in CASES}
    engine.close()


@pytest.fixture(scope="module")
def drafting(exact: EngineConfig, tiny_model: Path) -> Iterator[Engine]:
    engine = load(tiny_model, exact, 4)
    yield engine
    engine.close()


@pytest.mark.parametrize("name", CASES)
def test_drafts_change_no_bit(drafting: Engine, plain: dict[str, object], name: str) -> None:
    assert drafting.speculator is not None
    counts = drafting.speculator.counts
    before = replace(counts)
    assert run(drafting, [name])[0] == plain[name]
    if name == "switched off":
        assert counts.drafted == before.drafted
    else:
        assert counts.accepted > before.accepted


def test_what_a_grammar_forces_takes_few_steps(drafting: Engine, plain: dict[str, object]) -> None:
    """A step gives up to 5 tokens: 30 take 6 steps, and the step of the prompt."""
    before = drafting.num_steps
    assert run(drafting, ["no other choice"])[0] == plain["no other choice"]
    assert drafting.num_steps - before <= 8


def test_forced_tokens_and_ngrams_after_them_have_their_own_acceptance(
    exact: EngineConfig, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers: list[Offer] = []

    def spy(each: dict[str, Offer], *rest: Any) -> tuple[dict[str, int], float]:
        offers.extend(each.values())
        return best_counts(each, *rest)

    monkeypatch.setattr(speculator, "best_counts", spy)
    random_letters = {"regex": "(xyz[abcdefgh]){15}"}, {"seed": 5, "temperature": 2.0}
    monkeypatch.setitem(CASES, "random letters", random_letters)
    engine = load(tiny_model, exact, 5)
    try:
        run(engine, ["random letters"])
    finally:
        engine.close()
    assert any(0 < offer.num_forced < offer.count for offer in offers)
    assert offers[-1].acceptance < 0.5
    assert offers[-1].forced_acceptance > 0.9


@settings(max_examples=8)
@given(
    names=st.lists(st.sampled_from(sorted(CASES)), min_size=1, max_size=4),
    count=st.integers(1, 7),
    budget=st.integers(8, 60),
    blocks=st.integers(24, 60),
    kill_at=st.integers(0, 30),
    has_model=st.booleans(),
)
def test_bits_in_any_schedule(
    exact: EngineConfig,
    tiny_model: Path,
    plain: dict[str, object],
    names: list[str],
    count: int,
    budget: int,
    blocks: int,
    kill_at: int,
    has_model: bool,
) -> None:
    """With preemption, and with a worker of grammars that ends: the bits of a lone run.

    A request without a grammar, which a draft model drafts for, runs beside.
    """
    config = replace(exact, max_num_batched_tokens=budget, num_blocks=blocks, max_num_seqs=4)
    others = set(children_of(os.getpid()))
    engine = load(tiny_model, config, count, has_model=has_model)
    names = [*names, "no grammar"]

    def kill(number: int) -> None:
        if number == kill_at:
            for pid in set(children_of(os.getpid())) - others:
                os.kill(pid, signal.SIGKILL)

    try:
        assert run(engine, names, kill) == [plain[name] for name in names]
    finally:
        engine.close()
