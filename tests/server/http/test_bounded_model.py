"""Bounds on validation errors: pydantic must not collect a million of them."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nanovllm.server.http.bounded_model import MAX_FIELDS
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.schemas import CompletionRequest

MANY = {f"k{i}": 0 for i in range(MAX_FIELDS + 1)}
CHOICES = {"choice": [1] * 2000}
TOO_MANY: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "the body": (CompletionRequest, {"prompt": "a", **MANY}),
    "stream options": (CompletionRequest, {"prompt": "a", "stream": True, "stream_options": MANY}),
    "a format": (CompletionRequest, {"prompt": "a", "response_format": {"type": "text", **MANY}}),
    "a schema": (
        CompletionRequest,
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": MANY}},
    ),
    "structured outputs": (CompletionRequest, {"prompt": "a", "structured_outputs": MANY}),
    "choices": (CompletionRequest, {"prompt": "a", "structured_outputs": CHOICES}),
    "a few choices": (
        CompletionRequest,
        {"prompt": "a", "structured_outputs": {"choice": [1] * 9}},
    ),
    "a message": (ChatRequest, {"messages": [{"role": "user", "content": "a", **MANY}]}),
    "messages": (ChatRequest, {"messages": [1] * 500}),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_one_fault_is_found_of_many(name: str) -> None:
    kind, body = TOO_MANY[name]
    with pytest.raises(ValidationError) as found:
        kind.model_validate(json.loads(json.dumps(body)))
    assert found.value.error_count() == 1
