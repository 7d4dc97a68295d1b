"""Refused chats: fields, models and templates; faults of streams are events."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.engine.chat import template as chat_template
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.errors import InvalidRequestError
from nanovllm.server.openai.chat import CHAT, ChatRenderer
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.endpoint import prepare
from tests.support.chats import MESSAGES, ask, post, stream
from tests.support.serving import (
    MODEL,
    RunningServer,
    loader,
    read_error,
    run_threads,
    wait_until,
)


def with_part(part: object) -> dict[str, Any]:
    """Return the fields of a chat whose message has one part."""
    return {"messages": [{"role": "user", "content": [part]}]}


BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "too many": ({"messages": [{"role": "user", "content": "a"}] * 2049}, "messages", "2048"),
    "no list": ({"messages": "the"}, "messages", "list"),
    "a message that is text": ({"messages": ["the"]}, "messages", "messages.0"),
    "role": ({"messages": [{"role": "wizard", "content": "a"}]}, "messages", "assistant"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", "content"),
    "content null": (
        {"messages": [{"role": "user", "content": None}]}, "messages",
        "messages.0.content: must be text (given: null)",
    ),
    "an image": (
        with_part({"type": "image_url", "image_url": {"url": "x"}}), "messages",
        'part 0 has the type "image_url", which is not supported',
    ),
    "a part that is text": (with_part("a"), "messages", 'part 0 is no object (given: "a")'),
    "a part without text": (with_part({"type": "text"}), "messages", "part 0 has no text"),
    "a part with another field": (
        with_part({"type": "text", "text": "a", "cache": 1}), "messages",
        'part 0 has the field "cache"',
    ),
    "half a character": (
        {"messages": [{"role": "user", "content": "\ud800"}]}, None, "surrogate",
    ),
    "half a character in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        None, "surrogate",
    ),
    "a tool call": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "messages", "tool_calls is not supported",
    ),
    "an old tool call": (
        {"messages": [{"role": "assistant", "content": "", "function_call": {}}]}, "messages",
        "function_call is not supported",
    ),
    "an unknown key": (
        {"messages": [{"role": "user", "content": "a", "contents": 1}]}, "messages",
        "did you mean content?",
    ),
    "refused by the template": (
        {"messages": [{"role": "user", "content": "refuse me"}]}, "messages",
        "refuses the messages: no",
    ),
    "longer than the context": (
        {"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "context of 128",
    ),
    "far longer": (
        {"messages": [{"role": "user", "content": "x" * 200_000}]}, "messages", "at least",
    ),
    "answer longer than the context": ({"max_tokens": 120}, "max_tokens", "context of 128"),
    "answer longer than the context by its other name": (
        {"max_completion_tokens": 120}, "max_completion_tokens", "max_completion_tokens is 120",
    ),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", "1"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "4"),
    "tools": (
        {"tools": [{"type": "function"}]}, "tools", "not supported: this server calls no tools",
    ),
    "a choice of tools": ({"tool_choice": "required"}, "tool_choice", 'must be "none"'),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "calls no tools"),
    "a choice of functions": ({"function_call": {"name": "f"}}, "function_call", 'be "none"'),
    "a short answer": ({"verbosity": "low"}, "verbosity", 'must be "medium"'),
    "arguments of the template": (
        {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs",
        "takes no arguments",
    ),
    "sound": ({"modalities": ["text", "audio"]}, "modalities", "at most 1"),
    "sound alone": ({"modalities": ["audio"]}, "modalities", 'must be "text"'),
    "a field of another spelling": (
        {"max_completion_token": 5}, "max_completion_token", "did you mean max_completion_tokens?",
    ),
    "response_format": ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    "a template": ({"chat_template": "{{ messages }}"}, "chat_template", "not supported"),
    "two ends of the prompt": (
        {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
        "both true",
    ),
    "truncated to 0": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
    "truncated to more than the context": (
        {"truncate_prompt_tokens": 129}, "truncate_prompt_tokens", "128",
    ),
    "another side": (
        {"truncate_prompt_tokens": 5, "truncation_side": "middle"}, "truncation_side", "right",
    ),
    "no room for a truncated prompt": (
        {"truncate_prompt_tokens": -1, "max_completion_tokens": 128}, "max_completion_tokens",
        "128",
    ),
    "too many prompt_logprobs": ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
    "all prompt_logprobs": ({"prompt_logprobs": -1}, "prompt_logprobs", "0"),
    "token ids for texts without logprobs": (
        {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "logprobs",
    ),
    "token ids for texts with logprobs off": (
        {"return_tokens_as_token_ids": True, "logprobs": False}, "return_tokens_as_token_ids",
        "logprobs",
    ),
    "best_of below n": ({"best_of": 2, "n": 3}, "best_of", "3"),
    "best_of in a stream": ({"best_of": 3, "stream": True}, "best_of", "stream"),
    "a length_penalty without beams": (
        {"length_penalty": 1.0}, "length_penalty", "use_beam_search",
    ),
    "streamed beams": ({"use_beam_search": True, "stream": True}, "stream", "use_beam_search"),
    "sampled beams": ({"use_beam_search": True, "seed": 1}, "seed", "use_beam_search"),
    "echoed beams": ({"use_beam_search": True, "echo": True}, "echo", "use_beam_search"),
    "too many beams": ({"use_beam_search": True, "n": 11}, "n", "10"),
    "beams longer than the context": (
        {"use_beam_search": True, "max_completion_tokens": 128}, "max_completion_tokens", "128",
    ),
    "beams for a long prompt": (
        {"use_beam_search": True, "messages": [{"role": "user", "content": "x" * 200}]}, "messages",
        "no room",
    ),
    "n": ({"n": 129}, "n", "128"),
    "logprobs a number": ({"logprobs": 2}, "logprobs", "true or false"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    "stop": ({"stop": [""]}, "stop", "not empty"),
    "logit_bias": ({"logit_bias": {"267": 1}}, "logit_bias", "0 to 266"),
    "min_tokens": (
        {"min_tokens": 9, "max_completion_tokens": 8}, "min_tokens",
        "9 but max_completion_tokens only 8",
    ),
    "stream_options without stream": (
        {"stream_options": {"include_usage": True}}, "stream_options", "stream",
    ),
    "temperature": ({"temperature": 2.5}, "temperature", "2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_named(server: RunningServer, name: str) -> None:
    body, param, part = BAD[name]
    error = read_error(post(server, **body), 400)
    assert error["param"] == param
    assert part in error["message"]
    assert len(error["message"]) < 2500


def test_the_model_must_be_served_and_may_be_called_by_each_name(
    server: RunningServer,
) -> None:
    assert "other" in read_error(post(server, model="other"), 404)["message"]
    assert ask(server, model="alias", max_tokens=1)["model"] == "alias"
    assert ask(server, request_id="my-id", max_tokens=1)["id"] == "chatcmpl-my-id"


def test_without_a_template_it_says_what_to_do(llm: LLM) -> None:
    body = ChatRequest.model_validate({"messages": MESSAGES})
    with pytest.raises(InvalidRequestError, match="has no chat template") as caught:
        prepare(CHAT, body, llm.engine, None, MODEL)
    assert caught.value.param == "messages"
    assert "/v1/completions" in str(caught.value)
    assert "--chat-template plain" in str(caught.value)


def test_a_template_that_is_damaged_says_so_and_completions_go_on(
    tiny_model: Path, backend: str
) -> None:
    with RunningServer(
        loader(tiny_model), chat_template=ChatTemplate("{% if %}", "the/file")
    ) as running:
        message = read_error(post(running), 400)["message"]
        assert "the chat template the/file is not valid" in message
        assert "--chat-template plain" in message
        running.complete("the", max_tokens=1)


def test_a_template_that_does_not_end_is_a_400(
    tiny_model: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the thread that worked on it is free again."""
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.02)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with RunningServer(
        loader(tiny_model), chat_template=ChatTemplate(endless, "the test's")
    ) as running:
        for response in run_threads([lambda: post(running)] * 8):
            error = read_error(response, 400)
            assert error["param"] == "messages"
            assert "takes more than 0.02 s" in error["message"]
        running.complete("the", max_tokens=1)


def test_a_fault_in_the_middle_of_a_stream_is_an_event_before_the_end(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("the reason is for the log")

    monkeypatch.setattr(ChatRenderer, "pieces", fail)
    (event,) = stream(server, max_tokens=5)
    assert event["error"]["code"] == 500
    assert "for the log" not in event["error"]["message"]
    monkeypatch.undo()
    wait_until(server.is_idle)
