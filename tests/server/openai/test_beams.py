"""use_beam_search over HTTP: the answers of LLM.beam_search, and refusals of unrelated settings."""

import threading
from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM, BeamSearchParams
from nanovllm.engine.beam_search import BeamSearch
from nanovllm.engine.input_processor import InputProcessor
from tests.support.serving import MODEL, RunningServer

pytestmark = pytest.mark.both_backends


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
        ({"n": 11}, "n"),
        ({"n": 2, "best_of": 11}, "best_of"),
        ({"priority": 1}, "priority"),
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


def test_a_wide_search_of_many_prompts_leaves_room_for_others(
    server: RunningServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams fill at most one step, and the event loop computes nothing between two tokens."""
    engine = server.engine
    in_flight: list[int] = []
    threads: list[threading.Thread] = []
    generate, process, advance = engine.generate, InputProcessor.process, BeamSearch.advance
    loop_thread = server.on_loop(_current_thread)

    def watched_generate(prompts: Any, **options: Any) -> Any:
        in_flight.append(len(prompts))
        return generate(prompts, **options)

    def watched(real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            threads.append(threading.current_thread())
            return real(*given, **named)

        return call

    monkeypatch.setattr(engine, "generate", watched_generate)
    monkeypatch.setattr(InputProcessor, "process", watched(process))
    monkeypatch.setattr(BeamSearch, "advance", watched(advance))
    prompts = [[place + 1, 7] for place in range(40)]
    answer = server.complete(prompts, use_beam_search=True, n=3, max_tokens=3)
    monkeypatch.undo()
    assert max(in_flight) <= engine.engine.config.max_num_seqs
    assert len(threads) > 100
    assert loop_thread not in threads
    params = BeamSearchParams(beam_width=3, max_tokens=3)
    expected = llm.beam_search([list(prompt) for prompt in prompts], params, use_tqdm=False)
    assert [choice["text"] for choice in answer["choices"]] == [
        one.text for output in expected for one in output.outputs
    ]


async def _current_thread() -> threading.Thread:
    return threading.current_thread()
