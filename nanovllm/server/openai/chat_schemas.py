"""What a client may send to /v1/chat/completions. Names and ranges are those of OpenAI, the extensions those of vLLM.

As for completions, a field that is not listed here is refused by name. Messages are text: images,
sound and tools are refused. The answer of any server may be sent back as an assistant's message,
whatever keys it has: its text is read, and a tool call is refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import MAX_PROMPT_TOKENS
from nanovllm.server.http.bounds import BoundedModel, allow_nulls
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.problems import quote, quoted_input
from nanovllm.server.openai.response_types import Role
from nanovllm.server.openai.schemas import NO_EFFECT, Body, SamplingBody, UnusedFields

MAX_MESSAGES = 2048  # more than any context has tokens
_CALLS = ("tool_calls", "function_call")
_PART = ("type", "text")

_PART_SCHEMA = {
    "type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"],
    "additionalProperties": {"type": "null"},
}  # fmt: skip


def _joined(value: object) -> object:
    """Join parts of text to one text, with a line break between."""
    if not isinstance(value, list):
        return value
    for index, part in enumerate(value):
        fault = _part_fault(part)
        if fault:
            raise ValueError(
                f'must be text, or a list of {{"type": "text", "text": ...}}; part {index} {fault}'
            )
    return "\n".join(part["text"] for part in value)


def _part_fault(part: object) -> str | None:
    """Return why a part of a message is refused; None where it is text and nothing else."""
    if not isinstance(part, dict):
        return f"is no object{quoted_input(part)}"
    if part.get("type") != "text":
        return f"has the type {shorten(quote(part.get('type')))}, which is not supported"
    if not isinstance(part.get("text"), str):
        return f"has no text{quoted_input(part.get('text'))}"
    extra = (name for name, item in part.items() if name not in _PART and item is not None)
    return next((f"has the field {shorten(quote(n))}, which is not supported" for n in extra), None)


Content = Annotated[
    str,
    BeforeValidator(_joined),
    WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]


def _describe_message(schema: dict[str, Any]) -> None:
    allow_nulls(schema)
    no_call = {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}
    schema["properties"] |= dict.fromkeys(_CALLS, no_call)
    schema["additionalProperties"] = {
        "description": "ignored in an assistant's message; in others only null is accepted"
    }


class ChatMessage(BoundedModel):
    """One message; an assistant's may be sent back as any server sent it."""

    model_config = ConfigDict(json_schema_extra=_describe_message)

    role: Role
    content: Content
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_extras(cls, message: Any) -> Any:
        """Keep what is known of an assistant's message; raises ValueError for a tool call."""
        if not isinstance(message, dict):
            return message
        for name in _CALLS:
            if message.get(name) not in (None, []):
                raise ValueError(f"{name} is not supported: this server calls no tools")
        is_answer = message.get("role") == "assistant"
        return {
            name: item
            for name, item in message.items()
            if name in cls.model_fields or not (is_answer or name in _CALLS)
        }


def _no_tools(tools: object) -> object:
    if tools:
        raise ValueError("not supported: this server calls no tools; leave it out")
    return tools


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class PromptFields(Body):
    """How the prompt that messages make ends."""

    add_generation_prompt: bool | None = Field(
        None,
        description="end with the beginning of an answer; true unless continue_final_message is",
    )
    continue_final_message: bool = Field(
        False, description="end in the middle of the last message, which the answer continues"
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
    def has_generation_prompt(self) -> bool:
        """Whether the prompt ends with the beginning of an answer."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class UnusedChatFields(UnusedFields):
    """Fields of OpenAI's chat that change no answer where they have these values."""

    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = Field(
        None, description=NO_EFFECT
    )
    tools: Annotated[list[Any], Field(max_length=0), BeforeValidator(_no_tools)] | None = Field(
        None, description=NO_EFFECT
    )
    tool_choice: Literal["none"] | None = Field(None, description=NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)


class ChatRequest(SamplingBody, UnusedChatFields, PromptFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_PROMPT_TOKENS,
        description="most tokens to generate; left out, what the context has room for",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_PROMPT_TOKENS, description="another name of max_tokens"
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_PROMPT_TOKENS,
        description="with logprobs: how many of the most likely tokens to report at each position",
    )
    echo: bool | None = Field(
        False,
        description="put the last message in front of the answer if both have the same role",
    )
    add_special_tokens: bool = Field(
        False, description="those that the tokenizer puts around a text; GPT-2's has none"
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequestError(
                f"max_completion_tokens is {both[1]} and max_tokens is {both[0]}, which mean the same; leave one out",
                param="max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs; set logprobs to true or leave it out",
                param="top_logprobs",
            )
        self.check_against_logprobs(self.logprobs)
        return self

    @property
    def role(self) -> Role:
        """The role of the answer."""
        return "assistant" if self.has_generation_prompt else self.messages[-1].role

    @property
    def echoed_text(self) -> str:
        """The text in front of each answer."""
        last = self.messages[-1]
        return last.content if self.echo and last.role == self.role else ""

    @property
    def most_tokens(self) -> int | None:
        """`max_tokens` under either of its names."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def max_tokens_field(self) -> str:
        """The name by which the client sent it."""
        return (
            "max_completion_tokens"
            if self.max_tokens is None and self.max_completion_tokens
            else "max_tokens"
        )
