"""use_beam_search over HTTP: the answers of LLM.beam_search, and a clear refusal of what says nothing about a search."""

from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM, BeamSearchParams
from tests.support.serving import MODEL, RunningServer


def test_the_answers_are_those_of_the_search(client: OpenAI, llm: LLM) -> None:
    extra = {"use_beam_search": True, "length_penalty": 0.5}
    completion = client.completions.create(
        model=MODEL,
        prompt=["the", "a cat"],
        max_tokens=6,
        n=2,
        best_of=3,
        temperature=0,
        extra_body=extra,
    )
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.5)
    expected = [
        answer
        for output in llm.beam_search(["the", "a cat"], params, use_tqdm=False)
        for answer in output.outputs[:2]
    ]
    assert [(choice.index, choice.text, choice.finish_reason) for choice in completion.choices] == [
        (index, answer.text, answer.finish_reason) for index, answer in enumerate(expected)
    ]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == sum(len(answer.token_ids) for answer in expected)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"stop": "a"}, "stop"),
        ({"n": 11}, "beam_width"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"max_tokens": 100000}, "max_tokens"),
    ],
)
def test_what_says_nothing_about_a_search_is_refused(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    answer = server.post({"prompt": "the", "use_beam_search": True, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_length_penalty_without_a_search_is_refused(server: RunningServer) -> None:
    assert (
        server.post({"prompt": "the", "length_penalty": 1.0}).json()["error"]["param"]
        == "length_penalty"
    )
