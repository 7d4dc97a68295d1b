"""When the draft model drafts: it is tried again after a time in which it did not pay."""

from itertools import pairwise
from typing import cast

import pytest

from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.speculation.cost_model import StepTimes
from nanovllm.engine.speculation.draft_model import UNKNOWN, DraftModel
from nanovllm.engine.speculation.speculator import Speculator
from nanovllm.speculative_config import SpeculativeConfig
from tests.support.scheduling import make_request

ROWS_ARE_CHEAP = StepTimes((1, 8, 64), (1.0, 1.1, 8.0))


class LaggingModel:
    """Misses every token since it last drafted, as a draft model does."""

    def __init__(self) -> None:
        self.computed = 0

    def num_missing(self, request: Request) -> int:
        return len(request.tokens) - self.computed


def decoding_request() -> Request:
    request = make_request("r", 5, 1000)
    request.tokens.append(1)
    request.num_computed_tokens = 5
    assert request.is_decoding
    return request


def steps_with_drafts(pass_s: float, acceptance_after_a_trial: bool) -> list[int]:
    """Return the steps of 600 in which the model drafts, after it has been wrong for long."""
    model, request = LaggingModel(), decoding_request()
    speculator = Speculator(
        SpeculativeConfig(model="draft"),
        ROWS_ARE_CHEAP,
        lambda *_: (),
        cast("DraftModel", model),
        StepTimes((1, 64), (pass_s, 2 * pass_s)),
    )
    acceptances = speculator.acceptances[request.sampling.is_greedy]
    for _ in range(100):
        acceptances.add("model", 0, 5)
    drafts = []
    for step in range(600):
        speculator.choose([request])
        if request.drafted:
            assert set(request.drafted) == {UNKNOWN}
            drafts.append(step)
            model.computed = len(request.tokens)
            acceptances.add("model", acceptance_after_a_trial, 1)
            request.drafted = ()
        request.tokens.append(1)
        request.num_computed_tokens += 1
    return drafts


@pytest.mark.parametrize("times", [StepTimes((1,), (1.0,)), StepTimes((1, 2), (1.0, 2.0))])
def test_nothing_is_chosen_while_prompts_are_computed(times: StepTimes) -> None:
    """Times of no rows would be 0 or negative, and rates divide by them."""
    speculator = Speculator(SpeculativeConfig(), times, lambda *_: ())
    request = make_request("r", 5, 1000)
    speculator.choose([request])
    assert request.drafted == ()


def test_what_was_accepted_of_sampled_requests_says_nothing_of_greedy_ones() -> None:
    speculator = Speculator(SpeculativeConfig(), ROWS_ARE_CHEAP, lambda *_: ())
    sampled, greedy = (
        make_request(name, (7, 8, 9) * 4, 100, temperature=temperature)
        for name, temperature in (("sampled", 0.8), ("greedy", 0.0))
    )
    for request in (sampled, greedy):
        request.tokens.append(7)
        request.num_computed_tokens = 12
    for _ in range(100):
        speculator.acceptances[sampled.sampling.is_greedy].add("4-gram", 0, 5)
    speculator.choose([sampled])
    speculator.choose([greedy])
    assert (sampled.drafted, greedy.drafted) == ((), (8, 9, 7, 8, 9))


def test_a_draft_model_that_did_not_pay_is_tried_again_ever_more_rarely() -> None:
    drafts = steps_with_drafts(0.05, acceptance_after_a_trial=False)
    gaps = [after - before for before, after in pairwise(drafts)]
    assert len(drafts) >= 5
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 8 * gaps[0]


def test_a_draft_model_that_improves_drafts_again() -> None:
    assert len(steps_with_drafts(0.001, acceptance_after_a_trial=True)) > 100


def test_no_trial_costs_more_than_a_step() -> None:
    assert len(steps_with_drafts(20.0, acceptance_after_a_trial=False)) <= 1
