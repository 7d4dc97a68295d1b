"""Conversations of record_tokenizers.py, and the templates that render them.

The templates are written for these tests. They use the features of Jinja that the published ones
of their families use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PIPELINES = {
    "llama2": "llama2",
    "tinyllama": "llama2-first",
    "mistral": "mistral",
    "llama3": "llama3",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "smollm2": "smollm2",
}
"""{template: family of its tokenizer}."""


ENCODED = ("one question", "two questions", "reasoning")
"""Conversations whose token ids are recorded; they have no tools."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the arguments of apply_chat_template."""

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def template_source(name: str) -> str:
    """Return the source of a template."""
    path = Path(__file__).parent / "templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


def _say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


_SYSTEM = _say("system", " Be short.\n")
_ASK = _say("user", "Hello, is the world round? ")
_ANSWER = _say("assistant", " Yes.\n\nIt is é🙂 ")
_CALL = {
    "id": "abc123DEF",
    "type": "function",
    "function": {
        "name": "look_up",
        "arguments": {"word": '<é> & "q"', "count": 2, "deep": [1, None]},
    },
}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look up a 'word' <b>.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}},
                "required": ["word"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "é", "parameters": {}}},
]
_LOOKED = _say("assistant", "I look.", tool_calls=[_CALL])
_CALLED = _say("assistant", "", tool_calls=[_CALL])
_RESULT = _say("tool", '{"found": true}', tool_call_id="abc123DEF", name="look_up")
_MORE = _say("tool", "2026", tool_call_id="abc123DEF")
_ASKS: Mapping[str, Any] = {"add_generation_prompt": True}

CHATS: Mapping[str, Chat] = {
    "one question": Chat([_ASK], _ASKS),
    "closed": Chat([_SYSTEM, _ASK, _ANSWER]),
    "two questions": Chat([_SYSTEM, _ASK, _ANSWER, _say("user", "  Why?")], _ASKS),
    "not in turn": Chat([_ASK, _ASK], _ASKS),
    "tools": Chat([_SYSTEM, _ASK], {**_ASKS, "tools": _TOOLS}),
    "called": Chat([_ASK, _CALLED, _RESULT], {**_ASKS, "tools": _TOOLS}),
    "two results": Chat([_ASK, _LOOKED, _RESULT, _MORE], _ASKS),
    "two calls": Chat([_ASK, _say("assistant", "", tool_calls=[_CALL, _CALL]), _RESULT]),
    "reasoning": Chat(
        [_ASK, _say("assistant", "<think>\nHm.\n</think>\n\nYes."), _say("user", "Why?"),
         _say("assistant", "Because.", reasoning_content="\nSo.\n")],
    ),
    "no thinking": Chat([_ASK], {**_ASKS, "enable_thinking": False, "date_string": "26 Jul 2026"}),
    "documents": Chat(
        [_ASK], {"documents": [{"title": "One", "text": "a\nb"}, {"title": "", "text": "c"}]}
    ),
    "to go on": Chat([_ASK, _say("assistant", "It is round ")], {"continue_final_message": True}),
}  # fmt: skip
