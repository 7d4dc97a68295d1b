"""Fields of vLLM's chat: the prompt, what the answer shows of it, and how answers are chosen.

Below the messages a chat is a completion of token ids, so that most tests compare the two. Tests
named after vLLM have the assertions of its own tests.
"""

from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM
from tests.support.chats import MESSAGES, ask, post, prompt_of, stream
from tests.support.serving import MODEL, RunningServer, read_error

SAYING = "the end is in the"
OPEN_ENDED = [*MESSAGES, {"role": "assistant", "content": SAYING}]
CONTINUED: dict[str, Any] = {
    "messages": OPEN_ENDED,
    "continue_final_message": True,
    "max_tokens": 6,
    "temperature": 0,
}
BYTES = {"max_tokens": 24, "temperature": 1.5, "seed": 1, "ignore_eos": True}


def content_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def prompt_ids(server: RunningServer, **body: Any) -> list[int]:
    """The prompt that the model was given."""
    answer = ask(server, return_token_ids=True, **{"max_tokens": 1, **body})
    ids: list[int] = answer["prompt_token_ids"]
    assert len(ids) == answer["usage"]["prompt_tokens"]
    return ids


# The prompt ---------------------------------------------------------------------------------------


def test_the_last_message_goes_on(server: RunningServer, llm: LLM) -> None:
    ids = prompt_ids(server, **CONTINUED)
    text = llm.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(f"\nassistant: {SAYING}")
    assert prompt_ids(server, **CONTINUED, add_generation_prompt=False) == ids
    (choice,) = server.complete(ids, max_tokens=6, temperature=0)["choices"]
    assert content_of(ask(server, **CONTINUED)) == choice["text"]


def test_the_generation_prompt_may_be_left_out(server: RunningServer, llm: LLM) -> None:
    whole = prompt_ids(server)
    assert prompt_ids(server, add_generation_prompt=True) == whole == prompt_of(llm)
    bare = prompt_ids(server, add_generation_prompt=False)
    assert bare == prompt_of(llm, end="closed")
    assert whole[: len(bare)] == bare != whole


def test_the_answer_has_the_role_of_the_message_that_it_continues(
    server: RunningServer,
) -> None:
    body: dict[str, Any] = {"continue_final_message": True, "max_tokens": 3, "temperature": 0}
    (whole,) = ask(server, **body)["choices"]
    assert whole["message"]["role"] == "user"
    events = stream(server, **body)
    assert events[0]["choices"][0]["delta"]["role"] == "user"


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_may_be_truncated(server: RunningServer, llm: LLM, side: str | None) -> None:
    ids = prompt_of(llm)
    given = {} if side is None else {"truncation_side": side}
    kept = prompt_ids(server, truncate_prompt_tokens=9, **given)
    assert kept == (ids[:9] if side == "right" else ids[-9:])
    assert prompt_ids(server, truncate_prompt_tokens=100, **given) == ids


def test_a_long_conversation_may_be_truncated_to_what_fits(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "x" * 5000}]
    fitting = {"messages": messages, "truncate_prompt_tokens": -1}
    assert len(prompt_ids(server, **fitting, max_tokens=28)) == 100
    usage = ask(server, **fitting, ignore_eos=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (127, 1)
    error = read_error(
        post(server, **{**fitting, "messages": [{**messages[0], "content": "x" * 300_000}]}),
        400,
    )
    assert error["param"] == "messages"
    assert "262144" in error["message"]


# What the answer shows ----------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_an_echo_puts_the_last_message_in_front(
    server: RunningServer, n: int, *, streams: bool
) -> None:
    body = {**CONTINUED, "temperature": 1.0, "seed": 4, "n": n}
    texts = [choice["message"]["content"] for choice in ask(server, **body)["choices"]]
    if streams:
        found = dict.fromkeys(range(n), "")
        for event in stream(server, **body, echo=True):
            for choice in event["choices"]:
                found[choice["index"]] += choice["delta"].get("content") or ""
        echoed = list(found.values())
    else:
        choices = ask(server, **body, echo=True)["choices"]
        echoed = [choice["message"]["content"] for choice in choices]
    assert echoed == [SAYING + text for text in texts]


def test_an_echo_has_nothing_of_another_role(server: RunningServer) -> None:
    """As in vLLM: an answer that begins a message of its own goes on with none."""
    settings: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    assert content_of(ask(server, echo=True, **settings)) == content_of(ask(server, **settings))


@pytest.mark.parametrize("n", [1, 2])
def test_token_ids_are_those_of_the_prompt_and_the_answers(
    server: RunningServer, llm: LLM, n: int
) -> None:
    body: dict[str, Any] = {**BYTES, "n": n, "return_token_ids": True}
    whole = ask(server, **body)
    assert whole["prompt_token_ids"] == prompt_of(llm)
    ids = [choice["token_ids"] for choice in whole["choices"]]
    assert [llm.tokenizer.decode(each) for each in ids] == [
        choice["message"]["content"] for choice in whole["choices"]
    ]
    events = stream(server, **body)
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any(event.get("prompt_token_ids") for event in events[1:])
    found: dict[int, list[int]] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        found.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
    assert [found[index] for index in range(n)] == ids
    bare = ask(server, **{**body, "return_token_ids": False})
    assert bare.get("prompt_token_ids") is None
    assert bare["choices"][0].get("token_ids") is None


@pytest.mark.parametrize("streams", [False, True])
def test_prompt_logprobs_are_those_of_the_completion(
    server: RunningServer, llm: LLM, *, streams: bool
) -> None:
    settings: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "prompt_logprobs": 2, "n": 2}
    (flat, _) = server.complete(prompt_of(llm), **settings)["choices"]
    if streams:
        first, *others = stream(server, **settings)
        assert not any(event.get("prompt_logprobs") for event in others)
    else:
        first = ask(server, **settings)
    assert first["prompt_logprobs"] == flat["prompt_logprobs"]
    assert len(flat["prompt_logprobs"]) == len(prompt_of(llm))


def test_a_large_answer_has_them_too(server: RunningServer, llm: LLM) -> None:
    """One that is written piece by piece."""
    messages = [{"role": "user", "content": "x" * 60}]
    settings: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "prompt_logprobs": 1, "n": 3}
    answer = ask(server, messages=messages, return_token_ids=True, **settings)
    ids = prompt_of(llm, messages)
    assert answer["prompt_token_ids"] == ids
    (flat, *_) = server.complete(ids, **settings)["choices"]
    assert answer["prompt_logprobs"] == flat["prompt_logprobs"]
    assert answer["usage"]["completion_tokens"] == 9
    assert len(answer["choices"]) == 3


def test_logprobs_name_tokens_by_their_ids(server: RunningServer) -> None:
    body: dict[str, Any] = {**BYTES, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    (choice,) = ask(server, **body, return_tokens_as_token_ids=True)["choices"]
    (plain,) = ask(server, **body)["choices"]
    entries, texts = choice["logprobs"]["content"], plain["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [f"token_id:{i}" for i in choice["token_ids"]]
    for entry, text in zip(entries, texts, strict=True):
        assert {**entry, "token": "", "top_logprobs": []} == {
            **text,
            "token": "",
            "top_logprobs": [],
        }
        assert all(top["token"].startswith("token_id:") for top in entry["top_logprobs"])
        assert [top["bytes"] for top in entry["top_logprobs"]] == [
            top["bytes"] for top in text["top_logprobs"]
        ]


@pytest.mark.parametrize("streams", [False, True])
def test_tokens_join_to_the_text_and_bytes_to_its_bytes(
    server: RunningServer, *, streams: bool
) -> None:
    """Of a character in several tokens the last one has the text, and each has its own bytes."""
    body: dict[str, Any] = {
        **BYTES,
        "logit_bias": {str(token_id): 100 for token_id in range(128, 256)},
        "logprobs": True,
        "top_logprobs": 1,
    }
    text = content_of(ask(server, **body))
    parts = stream(server, **body) if streams else [ask(server, **body)]
    choices = [choice for part in parts for choice in part["choices"]]
    entries = [
        entry for choice in choices for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(entry["token"] for entry in entries) == text
    assert any(entry["token"] == "" for entry in entries)
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode(errors="replace") == text
    assert all(entry["bytes"] for entry in entries)


# Which answers ------------------------------------------------------------------------------------


def test_the_best_of_more_are_those_of_the_completion(server: RunningServer, llm: LLM) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 1.2,
        "seed": 3,
        "n": 2,
        "best_of": 6,
    }
    answer = ask(server, **settings)
    flat = server.complete(prompt_of(llm), **settings)
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        choice["text"] for choice in flat["choices"]
    ]
    assert answer["usage"]["completion_tokens"] == flat["usage"]["completion_tokens"] > 10


def test_beams_are_those_of_the_completion(server: RunningServer, llm: LLM) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 5, "n": 2, "best_of": 3, "temperature": 0, "use_beam_search": True,
        "length_penalty": 0.5,
    }  # fmt: skip
    answer = ask(server, **settings, request_id="mine")
    flat = server.complete(prompt_of(llm), **settings)
    assert [
        (choice["index"], choice["message"]["content"], choice["finish_reason"])
        for choice in answer["choices"]
    ] == [(choice["index"], choice["text"], choice["finish_reason"]) for choice in flat["choices"]]
    assert (answer["id"], answer["object"]) == ("chatcmpl-mine", "chat.completion")
    assert answer["usage"] == flat["usage"]
    ends = {"messages": OPEN_ENDED, "continue_final_message": True}
    ids = prompt_of(llm, OPEN_ENDED, end="open")
    assert (
        content_of(ask(server, **settings, **ends))
        == (server.complete(ids, **settings)["choices"][0]["text"])
    )


def test_beams_fill_the_context(server: RunningServer) -> None:
    answer = ask(server, use_beam_search=True, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == server.engine.engine.max_model_len


# The assertions of vLLM's tests -------------------------------------------------------------------


@pytest.mark.parametrize("echo", [True, False])
def test_vllm_echo_and_continue_final_message(chat_client: OpenAI, *, echo: bool) -> None:
    extra = {"echo": echo, "continue_final_message": True, "add_generation_prompt": False}
    answer = chat_client.chat.completions.create(
        model=MODEL, messages=OPEN_ENDED, max_tokens=8, temperature=0, extra_body=extra
    )
    (choice,) = answer.choices
    assert choice.message.content is not None
    assert (SAYING in choice.message.content) is echo
    assert choice.message.role == "assistant"


@pytest.mark.parametrize("count", [0, 1, 2, None])
def test_vllm_prompt_logprobs(chat_client: OpenAI, llm: LLM, count: int | None) -> None:
    extra = {} if count is None else {"prompt_logprobs": count}
    answer: Any = chat_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, extra_body=extra
    )
    found: Any = getattr(answer, "prompt_logprobs", None)
    if count is None:
        assert found is None
        return
    assert found[0] is None
    ids = prompt_of(llm)
    for token_id, position in zip(ids[1:], found[1:], strict=True):
        ranks = sorted(entry["rank"] for entry in position.values())
        assert position[str(token_id)]["rank"] == ranks[-1]
        assert ranks[:count] == list(range(1, count + 1))
        assert len(ranks) <= count + 1


def test_vllm_return_token_ids(chat_client: OpenAI, llm: LLM) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "You like emojis."},
        {"role": "user", "content": "cats 🐱"},
    ]
    settings: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 20}
    settings |= {"temperature": 0, "extra_body": {"return_token_ids": True}}
    answer: Any = chat_client.chat.completions.create(**settings, logprobs=True)
    assert isinstance(answer.choices[0].token_ids, list)
    prompt = llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    assert "You like emojis." in prompt
    assert "cats 🐱" in prompt
    assert llm.tokenizer.decode(answer.choices[0].token_ids) == answer.choices[0].message.content
    content, token_ids = "", []
    with chat_client.chat.completions.create(**settings, stream=True) as chunks:
        for place, chunk in enumerate(chunks):
            if place == 0:
                assert chunk.prompt_token_ids == answer.prompt_token_ids
            else:
                assert "prompt_token_ids" not in chunk.model_dump()
            content += chunk.choices[0].delta.content or ""
            if "token_ids" in (choice := chunk.choices[0].model_dump()):
                token_ids.extend(choice["token_ids"])
    assert (content, token_ids) == (answer.choices[0].message.content, answer.choices[0].token_ids)
