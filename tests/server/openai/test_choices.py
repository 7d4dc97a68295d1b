"""Which answers a prompt gets: best_of, equal answers, and their token ids."""

from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM, SamplingParams
from nanovllm.outputs import PositionLogprobs
from tests.support.serving import (
    MODEL,
    RunningServer,
    join_choices,
    whole_choices,
)

SAMPLED: dict[str, Any] = {
    "max_tokens": 12,
    "temperature": 1.3,
    "stop_token_ids": list(range(0, 60, 2)),
}
"""Answers of different lengths, so that the mean ranks them otherwise than the sum."""


def without_index(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in choice.items() if name != "index"}
        for choice in body["choices"]
    ]


def score(choice: dict[str, Any]) -> float:
    """Sum of the answer's log-probabilities."""
    return float(sum(choice["logprobs"]["token_logprobs"]))


def mean(choice: dict[str, Any]) -> float:
    return score(choice) / len(choice["logprobs"]["token_logprobs"])


# The best of more ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "best_of"), [(1, 2), (1, 6), (3, 6), (5, 6)])
def test_the_best_are_those_of_the_highest_mean_log_probability(
    server: RunningServer, seed: int, n: int, best_of: int
) -> None:
    every = server.complete("in the end", n=best_of, seed=seed, logprobs=1, **SAMPLED)
    best = server.complete("in the end", n=n, best_of=best_of, seed=seed, logprobs=1, **SAMPLED)
    expected = sorted(without_index(every), key=mean, reverse=True)[:n]
    assert without_index(best) == expected
    assert [choice["index"] for choice in best["choices"]] == list(range(n))
    assert best["usage"]["completion_tokens"] == every["usage"]["completion_tokens"], (
        "what was left out was generated as well"
    )
    assert best["usage"]["prompt_tokens"] == every["usage"]["prompt_tokens"]


def test_the_mean_ranks_otherwise_than_the_order_and_the_sum(server: RunningServer) -> None:
    """Otherwise the test before this one would not notice."""
    bodies = [
        server.complete("in the end", n=6, seed=seed, logprobs=1, **SAMPLED)["choices"]
        for seed in (1, 2, 3, 4)
    ]
    orders = [[max(choices, key=key)["index"] for choices in bodies] for key in (mean, score)]
    assert orders[0] != orders[1]
    assert any(orders[0])


def test_log_probabilities_that_rank_are_not_shown_unless_asked_for(server: RunningServer) -> None:
    shown = server.complete("in the end", n=2, best_of=5, seed=1, logprobs=0, **SAMPLED)
    hidden = server.complete("in the end", n=2, best_of=5, seed=1, **SAMPLED)
    assert [choice["logprobs"] for choice in hidden["choices"]] == [None, None]
    assert [choice["text"] for choice in hidden["choices"]] == [
        choice["text"] for choice in shown["choices"]
    ]


def test_each_prompt_has_its_own_best(server: RunningServer) -> None:
    settings = {
        "n": 2,
        "best_of": 4,
        "seed": 3,
        "logprobs": 2,
        "echo": True,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        **SAMPLED,
    }
    alone = [server.complete(prompt, **settings) for prompt in ("the end", "a cat")]
    together = server.complete(["the end", "a cat"], **settings)
    assert without_index(together) == without_index(alone[0]) + without_index(alone[1])
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2, 3]
    assert together["usage"]["completion_tokens"] == sum(
        body["usage"]["completion_tokens"] for body in alone
    )


def test_llm_finds_the_same_best(server: RunningServer, llm: LLM) -> None:
    settings: dict[str, Any] = {"n": 2, "best_of": 5, "seed": 2, **SAMPLED}
    body = server.complete("in the end", **settings)
    (output,) = llm.generate("in the end", SamplingParams(**settings), use_tqdm=False)
    assert [answer.text for answer in output.outputs] == [
        choice["text"] for choice in body["choices"]
    ]
    assert [answer.index for answer in output.outputs] == [0, 1]
    assert [(answer.logprobs, answer.cumulative_logprob) for answer in output.outputs] == [
        (None, None)
    ] * 2
    assert output.num_generated_tokens == body["usage"]["completion_tokens"]


def test_the_official_client_asks_for_the_best(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="the",
        n=2,
        best_of=4,
        max_tokens=5,
        temperature=1.0,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * 5


def test_a_scored_prompt_has_no_best(server: RunningServer) -> None:
    body = server.complete("the end", n=2, best_of=3, max_tokens=0, echo=True, logprobs=1)
    assert [choice["text"] for choice in body["choices"]] == ["the end"] * 2
    assert body["usage"]["completion_tokens"] == 0


def test_all_that_are_generated_count_in_the_queue(server: RunningServer) -> None:
    prompts = ["a"] * 59 + ["x" * 5000]  # too long, which would be found later
    for settings in ({"best_of": 20}, {"n": 20, "temperature": 0}):
        assert (
            "1200 choices at once, the limit is 1024"
            in server.error({"prompt": prompts, **settings})["message"]
        )


# Equal answers ------------------------------------------------------------------------------------

GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "log-probabilities": {"logprobs": 3},
    "echo": {"echo": True, "logprobs": 1, "prompt_logprobs": 2},
    "stop": {"stop": ["e", "a", "\ufffd"]},
    "penalties": {"frequency_penalty": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5},
    "seed": {"seed": 5, "temperature": 1e-6},
    "token ids": {"return_token_ids": True},
    "scoring": {"max_tokens": 0, "echo": True, "logprobs": 1},
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("stream", [False, True])
def test_greedy_answers_are_equal_and_computed_once(
    server: RunningServer, name: str, *, stream: bool
) -> None:
    settings = {
        "prompt": ["in the end", "a cat"],
        "temperature": 0,
        "max_tokens": 20,
        "ignore_eos": True,
        **GREEDY[name],
    }
    one = server.complete(**settings)
    before = server.samples()["generation_tokens_total"]
    if stream:
        *events, end = server.stream(n=3, stream_options={"include_usage": True}, **settings)
        answers, usage = join_choices(events), end["usage"]
    else:
        body = server.complete(n=3, **settings)
        answers, usage = whole_choices(body), body["usage"]
    assert answers == {
        place * 3 + copy: answer
        for place, answer in whole_choices(one).items()
        for copy in range(3)
    }
    computed = server.samples()["generation_tokens_total"] - before
    said = one["usage"]
    assert usage["completion_tokens"] == 3 * said["completion_tokens"]
    assert usage["prompt_tokens"] == said["prompt_tokens"]
    if name != "stop":  # where the engine may be some tokens ahead of the text
        assert computed == said["completion_tokens"]


def test_the_best_of_equal_answers_is_computed_once(server: RunningServer) -> None:
    settings = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    one = server.complete("in the end", **settings)
    before = server.samples()["generation_tokens_total"]
    body = server.complete("in the end", n=2, best_of=7, **settings)
    assert server.samples()["generation_tokens_total"] - before == 10
    assert without_index(body) == without_index(one) * 2
    assert body["usage"]["completion_tokens"] == 7 * 10


def test_llm_computes_equal_answers_once(llm: LLM) -> None:
    params = SamplingParams(temperature=0, n=4, max_tokens=6, ignore_eos=True, logprobs=1)
    before = llm.engine.stats().generation_tokens
    (output,) = llm.generate("in the end", params, use_tqdm=False)
    assert llm.engine.stats().generation_tokens - before == 6
    assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
    assert (
        len(
            {
                (answer.text, tuple(answer.token_ids), answer.cumulative_logprob)
                for answer in output.outputs
            }
        )
        == 1
    )
    assert output.num_generated_tokens == 4 * 6


def test_siblings_do_not_make_a_new_prompt_a_cached_one(server: RunningServer, llm: LLM) -> None:
    prompt = [21, 22, 23, 24] * 10
    settings = {"n": 4, "max_tokens": 2, "temperature": 1.0, "cache_salt": "siblings"}
    cached = [
        server.complete(prompt, **settings)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached == [0, 32]
    params = SamplingParams(n=4, max_tokens=2)
    assert [
        llm.generate([prompt], params, use_tqdm=False)[0].num_cached_tokens for _ in range(2)
    ] == [0, 32]


# Token ids in the answer --------------------------------------------------------------------------


def test_token_ids_come_with_every_choice(server: RunningServer, llm: LLM) -> None:
    settings: dict[str, Any] = {"n": 2, "seed": 4, "temperature": 1.0, "max_tokens": 9}
    body = server.complete("the end", return_token_ids=True, **settings)
    (output,) = llm.generate("the end", SamplingParams(**settings), use_tqdm=False)
    assert [choice["token_ids"] for choice in body["choices"]] == [
        answer.token_ids for answer in output.outputs
    ]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [
        output.prompt_token_ids
    ] * 2
    for value in (False, None):
        plain = server.complete("the end", return_token_ids=value, **settings)["choices"][0]
        assert (plain["token_ids"], plain["prompt_token_ids"]) == (None, None)


@pytest.mark.parametrize("echo", [False, True])
def test_token_ids_of_a_stream_add_up(slow_server: RunningServer, llm: LLM, *, echo: bool) -> None:
    """Also where tokens have no text yet: half characters, and what may become a stop string."""
    settings: dict[str, Any] = {
        "n": 2, "seed": 4, "temperature": 2.0, "max_tokens": 30, "return_token_ids": True,
        "echo": echo, "ignore_eos": True, "stop": "\x00" * 5,
        "allowed_token_ids": [*llm.tokenizer.encode("漢字 "), *llm.tokenizer.encode("\x00")],
    }  # fmt: skip
    whole = slow_server.complete(["the", "a cat"], **settings)
    pieces = [
        choice
        for event in slow_server.stream(["the", "a cat"], **settings)
        for choice in event["choices"]
    ]
    assert len(pieces) > 40
    for choice in whole["choices"]:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert [token for piece in own for token in piece["token_ids"]] == choice["token_ids"]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["prompt_token_ids"] for piece in own] == [choice["prompt_token_ids"]] + [
            None
        ] * (len(own) - 1)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_tokens_by_their_ids(
    server: RunningServer, llm: LLM, *, stream: bool
) -> None:
    """Parts of characters all read U+FFFD. Their ids tell them apart, and none hides another."""
    settings: dict[str, Any] = {
        "seed": 2,
        "temperature": 1.0,
        "max_tokens": 12,
        "logprobs": 4,
        "echo": True,
        "return_tokens_as_token_ids": True,
    }
    if stream:
        arrays = join_choices(server.stream("in the café", **settings))[0].logprobs
    else:
        arrays = whole_choices(server.complete("in the café", **settings))[0].logprobs
    assert arrays is not None
    params = SamplingParams(seed=2, temperature=1.0, max_tokens=12, logprobs=4, prompt_logprobs=4)
    (output,) = llm.generate("in the café", params, use_tqdm=False)
    answer = output.outputs[0]
    assert arrays["tokens"] == [
        f"token_id:{token}" for token in output.prompt_token_ids + answer.token_ids
    ]
    positions: list[PositionLogprobs | None] = [
        *(output.prompt_logprobs or []),
        *(answer.logprobs or []),
    ]
    for found, position in zip(arrays["top_logprobs"][1:], positions[1:], strict=True):
        assert position is not None
        assert found.keys() == {f"token_id:{token}" for token in position}
        assert list(found.values()) == sorted(found.values(), reverse=True)
    texts = whole_choices(
        server.complete("in the café", **{**settings, "return_tokens_as_token_ids": False})
    )[0].logprobs
    assert texts is not None
    assert (texts["text_offset"], texts["token_logprobs"]) == (
        arrays["text_offset"],
        arrays["token_logprobs"],
    )
