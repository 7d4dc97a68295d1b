"""Chats for tests: a template with all features, a conversation, and requests."""

import json
from typing import Any

import httpx

from nanovllm import LLM
from nanovllm.engine.chat.template import ChatTemplate
from tests.support.serving import RunningServer, read_events

SOURCE = """{% for message in messages %}
{% if message.content == 'refuse me' %}{{ raise_exception('no') }}{% endif %}
{{ message.role }}{{ '/' ~ message.name if message.name }}: {{ message.content }}{{ eos_token }}
{% endfor %}
{{ 'assistant:' if add_generation_prompt }}"""
TEMPLATE = ChatTemplate(SOURCE, "the test's")
MESSAGES: list[Any] = [{"role": "system", "content": "in"}, {"role": "user", "content": "the end"}]


def post(server: RunningServer, **body: Any) -> httpx.Response:
    """POST /v1/chat/completions, with MESSAGES unless others are given."""
    content = json.dumps({"messages": MESSAGES, **body}).encode()
    return server.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )


def ask(server: RunningServer, **body: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = post(server, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer."""
    response = post(server, stream=True, **body)
    assert response.status_code == 200, response.text
    return read_events(response.content)


def prompt_of(llm: LLM, messages: Any = None, **options: Any) -> list[int]:
    """The token ids of the prompt that the template makes."""
    given = MESSAGES if messages is None else messages
    return TEMPLATE.encode(given, llm.tokenizer, lambda _: None, **options)
