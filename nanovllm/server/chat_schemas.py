"""What a client may send to /v1/chat/completions. Names and ranges are those of OpenAI, the extensions those of vLLM.

As for completions, a field that is not listed here is refused by name. Messages are text: images, sound and tools are refused.
"""

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import MAX_PROMPT_TOKENS
from nanovllm.server.answers import Role
from nanovllm.server.bounds import BoundedModel
from nanovllm.server.schemas import Body, SamplingBody

MAX_MESSAGES = 2048  # more than any context has tokens

_PART_SCHEMA = {
    "type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"],
    "additionalProperties": False,
}  # fmt: skip


def _joined(value: object) -> object:
    """Parts of text as one text, with a line break between."""
    if not isinstance(value, list):
        return value
    for part in value:
        if (
            not isinstance(part, dict)
            or part.keys() != {"type", "text"}
            or part["type"] != "text"
            or not isinstance(part["text"], str)
        ):
            raise ValueError(
                'must be text, or a list of {"type": "text", "text": ...}; other parts are not supported'
            )
    return "\n".join(part["text"] for part in value)


Content = Annotated[
    str,
    BeforeValidator(_joined),
    WithJsonSchema({"oneOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]}),
]


class ChatMessage(BoundedModel):
    """One message; an assistant's may be sent back as it was received."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Role
    content: Content
    name: str | None = Field(None, max_length=256)
    refusal: None = None


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


class ChatRequest(SamplingBody, PromptFields):
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
