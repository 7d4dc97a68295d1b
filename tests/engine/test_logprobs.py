"""Packed log-probabilities: equal values, a tenth of the memory, and an estimate that holds."""

import math
import sys
from array import array
from pathlib import Path

import pytest

from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.logprobs import ENTRY_BYTES, POSITION_BYTES, LogprobList
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.families.registry import load_config
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import Logprob
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import process

FOUND = TokenLogprobs([50256, 7, 3], [-math.inf, -0.1, -2.5], 50257)


def test_nothing_is_lost() -> None:
    positions = [None, FOUND]
    logprobs = LogprobList(positions, str)
    expected = {
        50256: Logprob(-math.inf, 50257, "50256"),
        7: Logprob(-0.1, 1, "7"),
        3: Logprob(-2.5, 2, "3"),
    }
    assert len(logprobs) == 2
    assert list(logprobs) == logprobs == [None, expected]
    assert logprobs[1:] == [expected]
    assert logprobs[-1] == expected
    assert logprobs != [None]
    assert repr(logprobs) == repr([None, expected])


@pytest.mark.parametrize("count", [0, 1, 20, 100])
def test_a_position_takes_no_more_than_admission_counts(count: int) -> None:
    packed = TokenLogprobs(array("q", [1] * (count + 1)), array("f", [0.5] * (count + 1)), 2)
    assert sys.getsizeof(packed) + sum(
        map(sys.getsizeof, packed)
    ) <= POSITION_BYTES + ENTRY_BYTES * (count + 1)


def test_a_request_counts_every_position_that_it_reports(tiny_model: Path) -> None:
    model, tokenizer = load_config(tiny_model), Tokenizer.load(tiny_model)
    input_processor = InputProcessor(model, tokenizer, Limits(128, 1024, 20))

    def count(**settings: object) -> int:
        params = SamplingParams(**{"max_tokens": 5, **settings})  # type: ignore[arg-type]
        return process(input_processor, "id", [1] * 10, params).size.logprobs_bytes

    def position(logprobs: int) -> int:
        return POSITION_BYTES + ENTRY_BYTES * (logprobs + 1)

    assert count() == 0
    assert count(logprobs=0) == 5 * position(0)
    assert count(logprobs=20, n=3) == 15 * position(20)
    assert count(logprobs=20, n=3, temperature=0) == 5 * position(20)
    assert count(prompt_logprobs=2, n=3) == 10 * position(2)
    assert count(best_of=3) == 15 * position(0)
