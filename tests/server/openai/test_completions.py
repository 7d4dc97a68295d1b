"""POST /v1/completions, mostly through the official client: prompts, choices, ends and settings."""

from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM, SamplingParams
from tests.support.checkpoints import MERGES
from tests.support.serving import MODEL, RunningServer, run_threads, whole_choices

pytestmark = pytest.mark.both_backends


def texts(body: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_the_official_client_gets_a_completion(client: OpenAI, llm: LLM) -> None:
    completion = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=12, temperature=0
    )
    expected = llm.generate(
        "Once upon a time", SamplingParams(max_tokens=12, temperature=0), use_tqdm=False
    )[0]
    assert completion.id.startswith("cmpl-")
    assert (completion.object, completion.model) == ("text_completion", MODEL)
    assert completion.created > 1_600_000_000
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (
        0,
        expected.outputs[0].text,
        "length",
        None,
    )
    assert completion.usage is not None
    usage = completion.usage
    prompt_tokens = len(expected.prompt_token_ids)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        prompt_tokens,
        12,
        prompt_tokens + 12,
    )


def test_the_official_client_streams(client: OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "prompt": "in the",
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 3,
    }
    whole = client.completions.create(**settings).choices[0]
    with client.completions.create(**settings, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        whole.finish_reason
    ]


@pytest.mark.parametrize(
    "prompts", [["the", "a cat", "in the end, all was well"], [[1, 2, 3], [4], [5, 6] * 10]]
)
def test_a_list_of_prompts_is_answered_in_order(client: OpenAI, prompts: Any) -> None:
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    together = client.completions.create(prompt=prompts, **settings)
    alone = [client.completions.create(prompt=prompt, **settings) for prompt in prompts]
    assert [choice.index for choice in together.choices] == list(range(len(prompts)))
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(
        one.usage.prompt_tokens for one in alone if one.usage
    )
    assert together.usage.completion_tokens == 8 * len(prompts)


def test_token_ids_are_the_text_that_they_stand_for(server: RunningServer, llm: LLM) -> None:
    ids = llm.tokenizer.encode("the end in a word")
    settings = {"max_tokens": 8, "temperature": 0, "echo": True}
    from_text, from_ids, from_list = (
        server.complete(prompt, **settings) for prompt in ("the end in a word", ids, [ids])
    )
    assert texts(from_text) == texts(from_ids) == texts(from_list)
    assert texts(from_ids)[0].startswith("the end in a word")


def test_choices_are_in_the_order_of_the_prompts_times_n(server: RunningServer) -> None:
    settings = {"max_tokens": 6, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    body = server.complete(["the", "a cat"], n=3, **settings)
    alone = [server.complete(prompt, n=3, **settings) for prompt in ("the", "a cat")]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert texts(body) == texts(alone[0]) + texts(alone[1])
    assert len(set(texts(body))) == 6, "each of the n answers has draws of its own"
    usage = body["usage"]
    assert usage["completion_tokens"] == 36
    assert usage["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone), (
        "a prompt is counted once, not n times"
    )
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_first_of_n_answers_is_the_answer_of_n_1(server: RunningServer) -> None:
    settings = {"max_tokens": 10, "seed": 5, "temperature": 1.0}
    assert (
        texts(server.complete("the", n=4, **settings))[0]
        == texts(server.complete("the", **settings))[0]
    )


def test_a_seed_repeats_an_answer_and_none_does_not(server: RunningServer) -> None:
    settings = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True}
    assert texts(server.complete("the", seed=7, **settings)) == texts(
        server.complete("the", seed=7, **settings)
    )
    assert texts(server.complete("the", seed=7, **settings)) != texts(
        server.complete("the", seed=8, **settings)
    )
    assert texts(server.complete("the", **settings)) != texts(server.complete("the", **settings))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_any_64_bits_are_a_seed(server: RunningServer, seed: int) -> None:
    settings = {"max_tokens": 8, "temperature": 1.0, "seed": seed}
    assert texts(server.complete("the", **settings)) == texts(server.complete("the", **settings))


def words(server: RunningServer, **settings: Any) -> dict[str, Any]:
    """An answer of letters and spaces only, so that there is text to look for."""
    letters = list(
        range(ord("a") - 33, ord("z") - 33 + 1)
    )  # a byte-level token's id is the place of its byte in the alphabet, which begins with "!"
    return server.complete(
        "the", temperature=1.0, seed=1, allowed_token_ids=letters, **{"max_tokens": 40, **settings}
    )


def test_a_stop_string_ends_the_text_before_it(server: RunningServer) -> None:
    text = texts(words(server))[0]
    assert len(text) == 40
    stop = text[10:13]
    body = words(server, stop=stop)
    (choice,) = body["choices"]
    end = text.index(stop)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        text[:end],
        "stop",
        stop,
    )
    assert body["usage"]["completion_tokens"] == end + 3


def test_the_stop_string_that_ends_first_wins_and_may_be_kept(server: RunningServer) -> None:
    text = texts(words(server))[0]
    stops = ["0", text[20:24], text[5:9]]
    (choice,) = words(server, stop=stops, include_stop_str_in_output=True)["choices"]
    end = text.index(text[5:9]) + 4
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        text[:end],
        "stop",
        text[5:9],
    )


@pytest.mark.parametrize("turned", [False, True])
def test_of_stop_strings_that_end_together_the_longest_wins(
    server: RunningServer, *, turned: bool
) -> None:
    """Their order does not matter, so no part of a stop string stays. vLLM takes the first one."""
    text = texts(words(server))[0]
    end = next(end for end in range(6, 40) if text.index(text[end - 2 : end]) == end - 2)
    stops = [text[end - 2 : end], text[end - 5 : end]]
    (choice,) = words(server, stop=stops[::-1] if turned else stops)["choices"]
    assert (choice["text"], choice["stop_reason"]) == (text[: end - 5], text[end - 5 : end])


def test_a_stop_token_ends_the_answer_and_is_named(server: RunningServer) -> None:
    stop = ord("k") - 33
    (choice,) = server.complete(
        "the", temperature=0, logit_bias={str(stop): 100}, stop_token_ids=[stop], max_tokens=5
    )["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", stop)


def test_end_of_text_is_a_stop_without_a_reason_and_leaves_no_text(
    server: RunningServer, llm: LLM
) -> None:
    eos = llm.engine.model.eos_token_ids[0]
    (choice,) = server.complete("the", temperature=0, logit_bias={str(eos): 100}, max_tokens=5)[
        "choices"
    ]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    body = server.complete(
        "the", temperature=0, logit_bias={str(eos): 100}, max_tokens=5, ignore_eos=True
    )
    assert (texts(body), body["choices"][0]["finish_reason"]) == ([""], "length")
    assert body["usage"]["completion_tokens"] == 5
    shown = server.complete(
        "the",
        temperature=0,
        logit_bias={str(eos): 100},
        max_tokens=2,
        ignore_eos=True,
        skip_special_tokens=False,
    )
    assert texts(shown) == ["<|endoftext|>" * 2]


def test_max_tokens_is_16_where_it_is_left_out(server: RunningServer) -> None:
    assert server.complete("the", ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert (
        server.complete("the", ignore_eos=True, max_tokens=None)["usage"]["completion_tokens"] == 16
    )


def test_prompt_and_answer_may_fill_the_context(server: RunningServer) -> None:
    body = server.complete([1] * 100, max_tokens=28, ignore_eos=True)
    assert body["usage"]["total_tokens"] == 128


def test_usage_says_what_the_prefix_cache_had(server: RunningServer) -> None:
    prompt = [7, 9, 11, 13] * 20
    first = server.complete(prompt, max_tokens=1, cache_salt="usage")["usage"]
    second = server.complete(prompt, max_tokens=1, cache_salt="usage")["usage"]
    other = server.complete(prompt, max_tokens=1, cache_salt="another")["usage"]
    assert [
        usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, second, other)
    ] == [0, 64, 0]


@pytest.mark.parametrize("name", [None, "alias", MODEL])
def test_the_answer_carries_the_name_that_was_asked_for(
    server: RunningServer, name: str | None
) -> None:
    assert server.complete(**({} if name is None else {"model": name}), max_tokens=1)["model"] == (
        name or MODEL
    )


def test_a_request_id_is_part_of_the_answers_id(server: RunningServer) -> None:
    assert server.complete(request_id="mine-1", max_tokens=1)["id"] == "cmpl-mine-1"
    assert server.complete(max_tokens=1)["id"] != server.complete(max_tokens=1)["id"]


def test_the_same_request_id_may_be_used_twice_at_once(server: RunningServer) -> None:
    bodies = run_threads(
        [lambda: server.complete(request_id="twice", max_tokens=20, temperature=0, ignore_eos=True)]
        * 4
    )
    assert len({texts(body)[0] for body in bodies}) == 1


def test_fields_of_other_clients_are_accepted(server: RunningServer) -> None:
    """They say nothing, so the answers are those without them."""
    settings: dict[str, Any] = {"max_tokens": 8, "seed": 3, "ignore_eos": True}
    said = server.complete(
        user="somebody",
        suffix=None,
        best_of=1,
        logit_bias=None,
        stop=None,
        stream=None,
        echo=None,
        n=None,
        **settings,
    )
    assert said["choices"] == server.complete(**settings)["choices"]
    nulls = {
        "truncate_prompt_tokens": None,
        "return_token_ids": None,
        "return_tokens_as_token_ids": None,
    }
    assert (
        server.complete(n=2, best_of=2, **nulls, **settings)["choices"]
        == server.complete(n=2, **settings)["choices"]
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "only k": {"allowed_token_ids": [ord("k") - 33]},
    "biased to q": {"logit_bias": {str(ord("q") - 33): 100}},
    "few letters": {
        "allowed_token_ids": [ord(letter) - 33 for letter in "abcdef"],
        "temperature": 2.0,
        "seed": 4,
    },
    "repetition": {"repetition_penalty": 8.0},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 2.0},
    "frequency down": {"frequency_penalty": -2.0, "presence_penalty": -2.0},
    "bad words": {"bad_words": ["the", "a", "W"]},
    "hot": {"temperature": 2.0, "seed": 1},
    "hot, few": {"temperature": 2.0, "seed": 1, "top_k": 2},
    "hot, likely": {"temperature": 2.0, "seed": 1, "top_p": 0.3},
    "hot, not unlikely": {"temperature": 2.0, "seed": 1, "min_p": 0.5},
    "hot, at least 20": {"temperature": 2.0, "seed": 2, "min_tokens": 20, "ignore_eos": False},
    "with logprobs": {"logprobs": 3},
    "scored": {"prompt_logprobs": 1},
}


def test_settings_are_each_requests_own_in_a_mixed_batch(server: RunningServer) -> None:
    def ask(settings: dict[str, Any]) -> Any:
        body = server.complete(
            "in the end", **{"max_tokens": 24, "temperature": 0, "ignore_eos": True, **settings}
        )
        return whole_choices(body), [choice.get("prompt_logprobs") for choice in body["choices"]]

    alone = {name: ask(settings) for name, settings in SETTINGS.items()}
    for _ in range(2):
        together = run_threads(
            [lambda settings=settings: ask(settings) for settings in SETTINGS.values()]  # type: ignore[misc]
        )
        assert dict(zip(SETTINGS, together, strict=True)) == alone
    text = {name: answer[0].text for name, (answer, _) in alone.items()}
    assert text["only k"] == "k" * 24
    assert text["biased to q"] == "q" * 24
    assert set(text["few letters"]) <= set("abcdef")
    assert len(set(text["few letters"])) > 1
    assert text["plain"] == text["with logprobs"] == text["scored"]
    for name in (
        "repetition",
        "presence",
        "frequency",
        "hot",
        "hot, few",
        "hot, likely",
        "hot, not unlikely",
    ):
        assert text[name] != text["plain"], f"{name} changed nothing"
    assert len({text["hot"], text["hot, few"], text["hot, likely"], text["hot, not unlikely"]}) == 4
    assert alone["hot, at least 20"][0][0].finish_reason in ("stop", "length")


def test_penalties_count_what_was_said(server: RunningServer) -> None:
    """Among a few letters the greedy answer repeats itself, and penalties make it vary."""
    letters = [ord(letter) - 33 for letter in "abcdef"]

    def answer(**settings: float) -> str:
        return texts(
            server.complete(
                "the", temperature=0, allowed_token_ids=letters, max_tokens=60, **settings
            )
        )[0]

    def most(text: str) -> int:
        return max(map(text.count, "abcdef"))

    assert (
        most(answer(frequency_penalty=2.0)) < most(answer()) <= most(answer(frequency_penalty=-2.0))
    )
    assert len(set(answer(frequency_penalty=2.0))) > len(set(answer()))


def test_a_bad_word_is_never_said(server: RunningServer) -> None:
    plain = texts(words(server))[0]
    merged = {
        merge.replace(" ", "") for merge in MERGES
    }  # a pair with a token of its own is not spelt as two
    pair = next(plain[i : i + 2] for i in range(20) if plain[i : i + 2] not in merged)
    assert pair not in texts(words(server, bad_words=[pair]))[0]
    assert plain[0] not in texts(words(server, bad_words=[plain[0]]))[0]
