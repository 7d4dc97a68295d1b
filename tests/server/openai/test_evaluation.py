"""Evaluation programs read what `LLM` computes: lm-eval, the official client, plain HTTP."""

import http.client
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from openai import OpenAI

from nanovllm import LLM, RequestOutput, SamplingParams
from tests.support.serving import MODEL, TIMEOUT_S, RunningServer, join_choices, read_events

pytestmark = pytest.mark.both_backends

CLOSE = 1e-4
END = 266
CASES: list[tuple[list[int], list[int]]] = [
    ([5, 6, 7], [8]), ([40, 41], [42, 43, 44, 45]), ([END], [70, 71, 72]), ([9] * 100, [1, 2] * 13),
    ([3, 1, 4, 1, 5], [9, 2, 6]),
]  # fmt: skip
"""(context, continuation): one begins a rolling window, one leaves room for a single token."""


def lm_eval_asks(server: RunningServer, **body: Any) -> dict[str, Any]:
    """Send a request as lm-eval's local-completions (0.4.12) does, with an empty API key."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    content = json.dumps({"model": MODEL, "seed": 1234, **body})
    connection.request(
        "POST",
        "/v1/completions",
        content,
        {"Content-Type": "application/json", "Authorization": "Bearer "},
    )
    response = connection.getresponse()
    answer: dict[str, Any] = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    return answer


def lm_eval_reads(
    answer: dict[str, Any], context_lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    """Sum the continuation without the generated token; greedy if each token is the likeliest."""
    found = []
    for choice, length in zip(
        sorted(answer["choices"], key=lambda choice: choice["index"]), context_lengths, strict=True
    ):
        logprobs = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append(
            (
                sum(logprobs),
                all(
                    logprob == max(top.values())
                    for logprob, top in zip(logprobs, tops, strict=True)
                ),
            )
        )
    return found


def score(llm: LLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The same from the prompt's log-probabilities, without a token more than the prompt has."""
    output = llm.generate(
        [context + continuation], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False
    )[0]
    assert output.prompt_logprobs is not None
    entries = [
        position[token]
        for token, position in zip(
            continuation, output.prompt_logprobs[len(context) :], strict=True
        )
        if position
    ]
    assert len(entries) == len(continuation)
    return sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_lm_evals_loglikelihoods_are_those_of_llm(
    server: RunningServer, llm: LLM, batch_size: int
) -> None:
    likeliest = (
        llm.generate(
            [[5, 6, 7]],
            SamplingParams(temperature=0, max_tokens=3, ignore_eos=True),
            use_tqdm=False,
        )[0]
        .outputs[0]
        .token_ids
    )
    cases = [*CASES, ([5, 6, 7], likeliest)]
    found: list[tuple[float, bool]] = []
    for begin in range(0, len(cases), batch_size):
        batch = cases[begin : begin + batch_size]
        prompts = [context + continuation for context, continuation in batch]
        answer = lm_eval_asks(
            server, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, echo=True
        )
        found += lm_eval_reads(answer, [len(context) for context, _ in batch])
    expected = [score(llm, *case) for case in cases]
    assert [logprob for logprob, _ in found] == pytest.approx(
        [logprob for logprob, _ in expected], abs=CLOSE
    )
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert expected[-1][1], "a greedy continuation is called one"
    assert not all(is_greedy for _, is_greedy in expected)


def test_lm_evals_generations_are_those_of_llm(server: RunningServer, llm: LLM) -> None:
    prompts, stops = [context for context, _ in CASES], ["\n\n", "W", "<|endoftext|>"]
    answer = lm_eval_asks(server, prompt=prompts, max_tokens=20, temperature=0, stop=stops)
    outputs = llm.generate(
        [*prompts], SamplingParams(max_tokens=20, temperature=0, stop=stops), use_tqdm=False
    )
    texts = [
        choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
    ]
    assert texts == [output.outputs[0].text for output in outputs]


def test_lm_eval_finds_that_the_server_tokenises(server: RunningServer, llm: LLM) -> None:
    """What `tokenizer_backend=auto` asks. No bos or eos is named: it takes their texts for ids."""
    facts = server.http.get("/tokenizer_info").json()
    assert facts == {
        "bos_token": None, "eos_token": None, "eos_token_ids": [END],
        "special_tokens": {"<|endoftext|>": END}, "vocab_size": 267, "model_max_length": 128,
    }  # fmt: skip
    tokens = server.http.post(
        "/tokenize", json={"prompt": "test", "add_special_tokens": False}
    ).json()["tokens"]
    assert tokens == llm.tokenizer.encode("test", add_special_tokens=False)
    refused = server.post(
        {"prompt": [[None, 1, 2]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    )
    assert refused.status_code == 400, "a window without its first token is no prompt"


# Clients ------------------------------------------------------------------------------------------


def by_the_official_client(
    server: RunningServer, body: dict[str, Any]
) -> tuple[str, dict[str, list[Any]]]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        (choice,) = client.completions.create(model=MODEL, **body).choices
    assert choice.logprobs is not None
    return choice.text, choice.logprobs.model_dump()


def streamed_by_the_official_client(
    server: RunningServer, body: dict[str, Any]
) -> tuple[str, dict[str, list[Any]]]:
    text, arrays = "", dict[str, list[Any]]()
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(model=MODEL, stream=True, **body) as chunks,
    ):
        for chunk in chunks:
            (choice,) = chunk.choices
            text += choice.text
            for name, part in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                arrays[name] = arrays.get(name, []) + part
    return text, arrays


def by_plain_http(server: RunningServer, body: dict[str, Any]) -> tuple[str, dict[str, list[Any]]]:
    (choice,) = (
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status().json()["choices"]
    )
    return choice["text"], choice["logprobs"]


def streamed_by_plain_http(
    server: RunningServer, body: dict[str, Any]
) -> tuple[str, dict[str, list[Any]]]:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**body, "stream": True}
    ) as response:
        content = b"".join(response.iter_raw())
    answer = join_choices(read_events(content))[0]
    assert answer.logprobs is not None
    return answer.text, answer.logprobs


WAYS: list[Callable[[RunningServer, dict[str, Any]], tuple[str, dict[str, list[Any]]]]] = [
    by_the_official_client, streamed_by_the_official_client, by_plain_http, streamed_by_plain_http,
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "in the end", "temperature": 0, "max_tokens": 12, "logprobs": 5},
    "drawn": {"prompt": "a cat", "temperature": 1.0, "seed": 9, "max_tokens": 12, "logprobs": 2},
    "with its prompt": {
        "prompt": "in the end, all was well",
        "temperature": 0,
        "max_tokens": 3,
        "logprobs": 1,
        "echo": True,
    },
    "scored": {
        "prompt": "in the end, all was well",
        "temperature": 0,
        "max_tokens": 0,
        "logprobs": 1,
        "echo": True,
    },
}


def expected_from(llm: LLM, body: dict[str, Any]) -> RequestOutput:
    settings = {name: value for name, value in body.items() if name not in ("prompt", "echo")}
    prompt_logprobs = body["logprobs"] if body.get("echo") else None
    return llm.generate(
        body["prompt"], SamplingParams(**settings, prompt_logprobs=prompt_logprobs), use_tqdm=False
    )[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BODIES)
def test_every_client_reads_the_logprobs_of_llm(
    server: RunningServer,
    llm: LLM,
    way: Callable[[RunningServer, dict[str, Any]], tuple[str, dict[str, list[Any]]]],
    name: str,
) -> None:
    body = BODIES[name]
    output = expected_from(llm, body)
    answer = output.outputs[0]
    token_ids: list[int] = list(answer.token_ids)
    positions: list[Any] = list(answer.logprobs or ())
    if "echo" in body:
        token_ids, positions = (
            output.prompt_token_ids + token_ids,
            [*(output.prompt_logprobs or ()), *positions],
        )
    text, arrays = way(server, json.loads(json.dumps(body)))
    assert text == (body["prompt"] if "echo" in body else "") + answer.text
    assert "".join(arrays["tokens"]) == text
    first = 1 if "echo" in body else 0
    assert arrays["token_logprobs"][:first] == arrays["top_logprobs"][:first] == [None] * first
    own = [
        position[token_id].logprob
        for token_id, position in zip(token_ids, positions, strict=True)
        if position
    ]
    assert arrays["token_logprobs"][first:] == pytest.approx(own, abs=CLOSE)
    for top, position in zip(arrays["top_logprobs"][first:], positions[first:], strict=True):
        assert position is not None
        assert max(top.values()) == pytest.approx(
            max(entry.logprob for entry in position.values()), abs=CLOSE
        )
