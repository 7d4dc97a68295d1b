"""Check the chat messages of a Python program.

They have the format of the server's chat endpoint: text with a role. Keys with null or empty values
are ignored, so a message of a response can be sent back unchanged.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from nanovllm.errors import InvalidRequestError, printable

ROLES = ("system", "developer", "user", "assistant")
Messages: TypeAlias = Sequence[Mapping[str, object]]


def list_conversations(
    messages: Iterable[Mapping[str, object] | Messages],
) -> list[list[dict[str, Any]]]:
    """Return one or several conversations as lists of checked messages.

    Raises InvalidRequestError that names the invalid message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        _refuse(
            f"messages is a {type(messages).__name__} but must be a list of "
            '{"role": "user", "content": "..."}'
        )
    listed: list[Any] = list(messages)
    if listed and not isinstance(listed[0], Mapping):
        return [_read_conversation(conversation) for conversation in listed]
    return [_read_conversation(listed)]


def _read_conversation(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        _refuse(f"a conversation is a {type(messages).__name__} but must be a list of messages")
    read = [_read_message(index, message) for index, message in enumerate(messages)]
    if not read:
        _refuse("there are no messages; send at least one")
    return read


def _read_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        _refuse(f"message {index} is a {type(message).__name__} but must have a role and content")
    role = message.get("role")
    if role not in ROLES:
        _refuse(f"message {index} has the role {role!r} but must have one of {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if message.get(key):
            _refuse(f"message {index} has {key}, which is not supported; leave it out")
    read = {"role": role, "content": _read_content(index, message.get("content"))}
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            _refuse(f"message {index} has a name that is a {type(name).__name__}, not text")
        read["name"] = name
    return read


def _read_content(index: int, content: object) -> str:
    """Return the text of a message: a string, or text parts joined by line breaks."""
    if isinstance(content, str):
        return content
    parts: Iterable[Any] = content if isinstance(content, list | tuple) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            _refuse(
                f"message {index} has the content {printable(repr(content), 60)} but must have "
                'text, or a list of {"type": "text", "text": "..."}'
            )
        texts.append(text)
    return "\n".join(texts)


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, param="messages")
