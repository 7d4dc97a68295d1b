"""Beam search equals exhaustive search, and with one beam equals greedy sampling."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.engine.beam_search import Beam, BeamSearch
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import Logprob, PositionLogprobs
from tests.support.family_tokenizers import llama2
from tests.support.serving import ENGINE_SETTINGS

VOCAB, END = 4, 0


def network(token_ids: tuple[int, ...]) -> np.ndarray:
    """Return log-probabilities of the next token, a function of all tokens before."""
    scores = np.random.default_rng([21, *token_ids]).standard_normal(VOCAB)
    return np.asarray(scores - np.log(np.exp(scores).sum()), dtype=np.float64)


def position(token_ids: tuple[int, ...]) -> PositionLogprobs:
    logprobs = network(token_ids)
    order = np.argsort(-logprobs).tolist()
    return {
        token: Logprob(float(logprobs[token]), rank, str(token))
        for rank, token in enumerate(order, start=1)
    }


def search(width: int, length: int, **settings: float) -> list[Beam]:
    beam_search = BeamSearch(
        [9],
        BeamSearchParams(beam_width=width, max_tokens=length, **settings),  # type: ignore[arg-type]
        [END],
    )
    while not beam_search.is_finished:
        beam_search.advance([position(tuple(prompt)) for prompt in beam_search.prompts()])
    return beam_search.best(width)


def all_outputs(length: int) -> list[Beam]:
    """Return every possible output."""
    beams = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(VOCAB), repeat=size):
            ends = tokens[-1] == END
            if END in tokens[:-1] or not (ends or size == length):
                continue
            total = sum(network((9, *tokens[:index]))[token] for index, token in enumerate(tokens))
            beams.append(Beam(tokens, float(total), ends))
    return beams


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_answers(length_penalty: float) -> None:
    length, width = 4, VOCAB**4
    outputs = all_outputs(length)
    best = max(
        outputs,
        key=lambda beam: (
            beam.cumulative_logprob / max(len(beam.token_ids) - beam.has_ended, 1) ** length_penalty
        ),
    )
    beams = search(width, length, length_penalty=length_penalty)
    assert len(beams) == len(outputs)
    assert beams[0].token_ids == best.token_ids
    assert math.isclose(beams[0].cumulative_logprob, best.cumulative_logprob)


def test_wider_beams_never_lose_the_whole_answers_probability() -> None:
    best = [
        search(width, 5, length_penalty=0.0)[0].cumulative_logprob for width in (1, 4, 64, 1024)
    ]
    assert best[-1] == max(best)
    assert best[-1] > best[0], "greedy sampling must not be optimal for this network"


@pytest.fixture(scope="module")
def llm(tiny_model: Path, backend: str) -> LLM:
    return LLM(tiny_model, **ENGINE_SETTINGS)


def test_a_width_of_one_is_greedy(llm: LLM) -> None:
    (beam,) = llm.beam_search(
        "the end", BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True), use_tqdm=False
    )
    (greedy,) = llm.generate(
        "the end",
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0),
        use_tqdm=False,
    )
    assert beam.outputs[0].token_ids == greedy.outputs[0].token_ids
    assert beam.outputs[0].text == greedy.outputs[0].text
    assert beam.outputs[0].cumulative_logprob == pytest.approx(
        greedy.outputs[0].cumulative_logprob, abs=1e-5
    )


def test_scores_are_those_of_the_answers_read_as_prompts(llm: LLM) -> None:
    prompts: list[Any] = ["the", [1, 2, 3]]
    for output in llm.beam_search(
        prompts, BeamSearchParams(beam_width=3, max_tokens=6), use_tqdm=False
    ):
        totals = [answer.cumulative_logprob or 0.0 for answer in output.outputs]
        lengths = [
            len(answer.token_ids) - (answer.finish_reason == "stop") for answer in output.outputs
        ]
        scores = [total / max(length, 1) for total, length in zip(totals, lengths, strict=True)]
        assert scores == sorted(scores, reverse=True)
        for answer, total in zip(output.outputs, totals, strict=True):
            whole = [*output.prompt_token_ids, *answer.token_ids]
            (read,) = llm.generate(
                [whole], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False
            )
            assert read.prompt_logprobs is not None
            entries = zip(
                read.prompt_logprobs[len(output.prompt_token_ids) :], answer.token_ids, strict=True
            )
            assert sum(entry[token].logprob for entry, token in entries if entry) == pytest.approx(
                total, abs=1e-4
            )


def test_invalid_settings_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="beam_width is 0"):
        BeamSearchParams(beam_width=0)
    with pytest.raises(InvalidRequestError, match="length_penalty"):
        BeamSearchParams(beam_width=1, length_penalty=float("nan"))
    with pytest.raises(InvalidRequestError, match="the limit is 10"):
        llm.beam_search("the", BeamSearchParams(beam_width=11))
    with pytest.raises(ContextLengthError, match="more than the"):
        llm.beam_search("the", BeamSearchParams(beam_width=2, max_tokens=10**6))


@pytest.mark.parametrize(("prompt", "expected"), [("Hello", " the world"), ("", "the world")])
def test_the_text_of_an_output_continues_the_prompt(prompt: str, expected: str) -> None:
    tokenizer = llama2().tokenizer
    token_ids = tokenizer.encode("the world", add_special_tokens=False)
    params = BeamSearchParams(beam_width=1, max_tokens=len(token_ids))
    beam_search = BeamSearch([1, *tokenizer.encode(prompt)[1:]], params, [2])
    for token_id in token_ids:
        beam_search.advance([{token_id: Logprob(-1.0, 1, "")}])
    (output,) = beam_search.output("request", tokenizer, 1).outputs
    assert output.text == expected
