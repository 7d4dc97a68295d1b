"""Later steps of a draft reuse the arrays of the first: they equal arrays that are built anew."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import pytest

from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import PlannedSequence, StepPlan
from nanovllm.engine.scheduling.token_rules import TokenRules
from nanovllm.engine.speculation.draft_model import UNKNOWN, DraftModel, _Draft, _Inputs
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.sampling import SamplingSettings
from nanovllm.runner.logit_rows import LogitRows
from nanovllm.runner.native_model_runner import NativeModelRunner, RunnerOutput
from tests.support.scheduling import make_request

BLOCK_SIZE = 4
BAN = 3


class Network:
    """Draws tokens that depend on tokens, positions and slots; keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[ForwardBatch, LogitRows, SamplingSettings]] = []

    def run(self, batch: ForwardBatch, rows: LogitRows, settings: SamplingSettings) -> RunnerOutput:
        self.calls.append((batch, rows, settings))
        batch.check(vocab=10**9, max_positions=100, blocks=100, block_size=BLOCK_SIZE)
        logits = 31 * batch.token_ids + 7 * batch.positions + batch.slots
        tokens: list[int | None] = [int(logits[row]) % 50 for row in batch.logit_rows]
        return RunnerOutput(tokens, [None] * len(tokens), [])

    def draw(
        self, batch: ForwardBatch, rows: LogitRows, settings: SamplingSettings, steps: int
    ) -> list[list[int | None]]:
        """Take the steps of a compiled run one by one, at most 3 in a run."""
        inputs, drawn = _Inputs(batch, rows, settings, is_steady=True), []
        for _ in range(min(steps, 3)):
            drawn.append(self.run(inputs.batch, inputs.rows, inputs.settings).token_ids)
            inputs = inputs.following([token or 0 for token in drawn[-1]], BLOCK_SIZE)
        return drawn


class AnewModel(DraftModel):
    """Builds the arrays of every step from its drafts."""

    def _inputs(self, drafts: Sequence[_Draft]) -> _Inputs:
        return replace(super()._inputs(drafts), is_steady=False)


def requests_of(kinds: Sequence[dict[str, Any]]) -> list[Request]:
    requests = []
    for number, kind in enumerate(kinds):
        request = make_request(f"r{number}", 5 + number, 50, **kind)
        request.tokens += [8, 9]
        request.num_computed_tokens = len(request.tokens) - 1
        request.block_ids = [10 * number + 9 - index for index in range(6)]
        requests.append(request)
    return requests


def draft(
    kind: type[DraftModel], requests: Sequence[Request], counts: Sequence[int]
) -> tuple[list[tuple[int, ...]], Network]:
    """Draft twice, so that the second time no token is missing but the last."""
    network, drafted = Network(), []
    model = kind(cast("NativeModelRunner", network), BLOCK_SIZE, 64)
    for _ in range(2):
        planned = [
            replace(PlannedSequence.of(request, 1), drafted=(UNKNOWN,) * count, samples=True)
            for request, count in zip(requests, counts, strict=True)
        ]
        plan = model.draft(StepPlan(sequences=tuple(planned), copies=()))
        drafted += [sequence.drafted for sequence in plan.sequences]
    return drafted, network


def arrays_of(value: Any) -> list[np.ndarray]:
    if is_dataclass(value):
        return [array for field in fields(value) for array in arrays_of(getattr(value, field.name))]
    return [value]


CASES: dict[str, tuple[list[dict[str, Any]], list[int], bool]] = {
    "greedy": ([{}], [5], True),
    "greedy, of several lengths": ([{}, {}, {}], [5, 2, 4], True),
    "sampled beside greedy": ([{"temperature": 0.8}, {}], [4, 4], True),
    "one ends earlier": ([{}, {"temperature": 0.8}, {}], [5, 2, 5], True),
    "penalties": ([{"repetition_penalty": 1.5}], [4], False),
    "penalties of the output": ([{"presence_penalty": 0.5}, {}], [4, 4], False),
    "biases": ([{"logit_bias": {BAN: -5.0}}], [4], False),
    "tokens to come before an end": ([{"min_tokens": 5}, {}], [5, 5], True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_steps_of_a_draft_get_the_arrays_that_would_be_built_anew(name: str) -> None:
    kinds, counts, is_reused = CASES[name]
    drafted, fast = draft(DraftModel, requests_of(kinds), counts)
    expected, slow = draft(AnewModel, requests_of(kinds), counts)
    assert drafted == expected
    assert [len(tokens) for tokens in drafted] == counts * 2
    assert len(fast.calls) == len(slow.calls) == 2 * max(counts)
    for ours, anew in zip(fast.calls, slow.calls, strict=True):
        for one, other in zip(ours, anew, strict=True):
            for array, twin in zip(arrays_of(one), arrays_of(other), strict=True):
                assert array.dtype == twin.dtype
                assert np.array_equal(array, twin)
    settings = {id(call[2].seeds) for call in fast.calls}
    assert (len(settings) < len(fast.calls)) == is_reused


def test_a_word_that_is_banned_within_a_draft_is_not_drafted() -> None:
    request = requests_of([{}])[0]
    tokens = draft(DraftModel, [request], [5])[0][0]
    request.rules = TokenRules(request.sampling, [tokens[1:3]])
    _, network = draft(DraftModel, [request], [5])
    banned = [call[2].edits.token_ids.tolist() for call in network.calls[:5]]
    assert banned == [[], [], [tokens[2]], [], []]
