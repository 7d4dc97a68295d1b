"""The fields of /v1/chat/completions, and messages.

Messages are text: images, audio and tools are refused. The answer of any server may be sent back as
an assistant's message, whatever keys it has: its text is read, and a tool call is refused.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from nanovllm.engine.chat.template import PromptEnd
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import Count
from nanovllm.server.http.bounded_model import BoundedModel, allow_nulls
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.validation_errors import quote, quoted_input
from nanovllm.server.openai.response_types import Role
from nanovllm.server.openai.schemas import (
    MAX_TOKENS,
    NO_EFFECT,
    SPECIAL_TOKENS,
    Body,
    MaxTokens,
    SamplingBody,
    UnusedFields,
    refuse,
)

MAX_MESSAGES = 2048
_CALLS = ("tool_calls", "function_call")
_PART = ("type", "text", "cache_control")  # the last one is for servers that ask where to cache


def join_parts(value: object, part_type: str = "text", answer_type: str | None = None) -> object:
    """Join parts of text by line breaks; raises ValueError for another part.

    Parts have `part_type`, or `answer_type`, which an earlier response has with any other fields.
    """
    if not isinstance(value, list):
        return value
    for index, part in enumerate(value):
        fault = _part_fault(part, part_type, answer_type)
        if fault:
            raise ValueError(
                f'must be text, or a list of {{"type": "{part_type}", "text": ...}}; '
                f"part {index} {fault}"
            )
    return "\n".join(part["text"] for part in value)


def _part_fault(part: object, part_type: str, answer_type: str | None) -> str | None:
    """Return why a part of a message is refused; None where it is text and nothing else."""
    if not isinstance(part, dict):
        return f"is no object{quoted_input(part)}"
    if part.get("type") is None or part["type"] not in (part_type, answer_type):
        return f"has the type {shorten(quote(part.get('type')))}, which is not supported"
    if not isinstance(part.get("text"), str):
        return f"has no text{quoted_input(part.get('text'))}"
    if part["type"] == answer_type:
        return None
    extra = (name for name, item in part.items() if name not in _PART and item is not None)
    return next((f"has the field {shorten(quote(n))}, which is not supported" for n in extra), None)


def content_schema(part_type: str) -> dict[str, Any]:
    """Return the JSON schema of a message's content."""
    fields = {
        "type": {"const": part_type}, "text": {"type": "string"},
        "cache_control": {"description": NO_EFFECT},
    }  # fmt: skip
    part = {
        "type": "object", "properties": fields, "required": ["type", "text"],
        "additionalProperties": {"type": "null"},
    }  # fmt: skip
    return {"oneOf": [{"type": "string"}, {"type": "array", "items": part}]}


Content = Annotated[str, BeforeValidator(join_parts), WithJsonSchema(content_schema("text"))]


def _describe_message(schema: dict[str, Any]) -> None:
    allow_nulls(schema)
    no_call = {"anyOf": [NO_ITEMS, {"type": "null"}]}
    schema["properties"] |= {**dict.fromkeys(_CALLS, no_call), "id": {"description": NO_EFFECT}}
    schema["additionalProperties"] = {
        "description": "ignored in an assistant's message; in others only null is accepted"
    }


class ChatMessage(BoundedModel):
    """One message; an assistant's may be sent back as any server sent it.

    An assistant's may have no content, as other servers answer with calls alone.
    """

    model_config = ConfigDict(json_schema_extra=_describe_message)
    unused_keys: ClassVar[tuple[str, ...]] = (*_CALLS, "id")

    role: Role
    content: Content
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_extras(cls, message: Any) -> Any:
        """Drop keys without effect, and all unknown ones of an assistant's message.

        Raises ValueError for a tool call.
        """
        if not isinstance(message, dict):
            return message
        for name in _CALLS:
            if message.get(name) not in (None, []):
                raise ValueError(f"{name} is not supported: this server calls no tools")
        is_answer = message.get("role") == "assistant"
        kept = {
            name: item
            for name, item in message.items()
            if name in cls.model_fields or not (is_answer or name in cls.unused_keys)
        }
        if is_answer and kept.get("content") is None:
            kept["content"] = ""
        return kept


NO_ITEMS = {"type": "array", "maxItems": 0}
Tools = Annotated[
    list[Any],
    Field(max_length=0),
    refuse("this server calls no tools", []),
    WithJsonSchema(NO_ITEMS),
]


NoArguments = Annotated[
    dict[str, Any],
    refuse("the chat template takes no arguments", {}),
    WithJsonSchema({"type": "object", "maxProperties": 0}),
]
Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class PromptFields(Body):
    """How the prompt of a conversation ends."""

    add_generation_prompt: bool | None = Field(
        None,
        description="end the prompt with the beginning of an answer; by default true unless "
        "continue_final_message is",
    )
    continue_final_message: bool = Field(
        False,
        description="end the prompt in the middle of the last message, which the answer continues",
    )

    @model_validator(mode="after")
    def _check_end(self) -> "PromptFields":
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt are both true, but a prompt ends "
                "with either the last message or the beginning of another; leave one of them out",
                param="continue_final_message",
            )
        return self

    @property
    def prompt_end(self) -> PromptEnd:
        """What the prompt ends with; by default with the beginning of an answer."""
        if self.continue_final_message:
            return "open"
        return "closed" if self.add_generation_prompt is False else "generation_prompt"


class UnusedChatFields(UnusedFields):
    """Fields of OpenAI's chat that are accepted with these values, and have no effect."""

    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = Field(
        None, description=NO_EFFECT
    )
    tools: Tools | None = Field(None, description=NO_EFFECT)
    tool_choice: Literal["none", "auto"] | None = Field(None, description=NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    functions: Tools | None = Field(None, description=NO_EFFECT)
    function_call: Literal["none", "auto"] | None = Field(None, description=NO_EFFECT)
    chat_template_kwargs: NoArguments | None = Field(None, description=NO_EFFECT)
    prediction: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    verbosity: Literal["medium"] | None = Field(None, description=NO_EFFECT)


class ChatRequest(SamplingBody, UnusedChatFields, PromptFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(description="the conversation, up to 2,048 messages")
    max_tokens: MaxTokens | None = Field(None, description=MAX_TOKENS)
    max_completion_tokens: MaxTokens | None = Field(None, description="another name of max_tokens")
    logprobs: bool | None = Field(
        False, description="report the log-probability of each token, and its bytes"
    )
    top_logprobs: Count | None = Field(
        None,
        description="with logprobs: number of most likely tokens to report at each position",
    )
    echo: bool | None = Field(
        False,
        description="put the last message in front of the answer if both have the same role",
    )
    add_special_tokens: bool = Field(False, description=SPECIAL_TOKENS)

    needed_fields: ClassVar[Mapping[str, str]] = {
        **SamplingBody.needed_fields, "top_logprobs": "logprobs",
    }  # fmt: skip

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequestError(
                f"max_completion_tokens is {both[1]} and max_tokens is {both[0]}, which mean the "
                "same; leave one out",
                param="max_completion_tokens",
            )
        return self

    @property
    def role(self) -> Role:
        """The role of the answer."""
        return "assistant" if self.prompt_end == "generation_prompt" else self.messages[-1].role

    @property
    def echoed_text(self) -> str:
        """The text in front of each answer."""
        last = self.messages[-1]
        return last.content if self.echo and last.role == self.role else ""

    @property
    def logged_prompts(self) -> list[str | list[int]]:
        """The texts of the messages, for the request log."""
        return [message.content for message in self.messages]

    @property
    def num_choices(self) -> int:
        """Number of choices that are generated."""
        return self.num_candidates

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        is_other = self.max_tokens is None and self.max_completion_tokens is not None
        name = "max_completion_tokens" if is_other else "max_tokens"
        return {**super().field_names, "prompt": "messages", "max_tokens": name}
