"""The fields of /v1/responses, and the items of its input.

The messages have the rules of chats (chat_schemas.py), with other types of parts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from nanovllm.sampling_params import Temperature, TopP
from nanovllm.server.http.bounded_model import BoundedModel, JSONObject
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.validation_errors import quote
from nanovllm.server.openai.chat_schemas import (
    MAX_MESSAGES,
    NO_ITEMS,
    ChatMessage,
    Tools,
    content_schema,
    join_parts,
)
from nanovllm.server.openai.schemas import (
    MAX_TOKENS,
    NO_EFFECT,
    STREAM,
    GenerationBody,
    MaxTokens,
    UnusedFields,
    refuse,
    setting_field,
)

MAX_ID_CHARACTERS = 256
_join_parts = partial(join_parts, part_type="input_text", answer_type="output_text")


class InputMessage(ChatMessage):
    """One item of `input`; an assistant's may be an output item of an earlier response."""

    unused_keys: ClassVar[tuple[str, ...]] = (*ChatMessage.unused_keys, "status")

    type: Literal["message"] | None = None
    content: Annotated[
        str, BeforeValidator(_join_parts), WithJsonSchema(content_schema("input_text"))
    ]

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, item: Any) -> Any:
        if isinstance(item, dict) and item.get("type") not in (None, "message"):
            raise ValueError(f"the type {shorten(quote(item['type']))} is not supported")
        return item


class ItemReference(BoundedModel):
    """An item of `input` that is the message of a stored response."""

    type: Literal["item_reference"]
    id: str = Field(max_length=MAX_ID_CHARACTERS)


def _check_item(item: Any, _: ValidatorFunctionWrapHandler) -> Any:
    """Return a checked item; a union type would report the errors of both types."""
    is_reference = isinstance(item, dict) and item.get("type") == "item_reference"
    return (ItemReference if is_reference else InputMessage).model_validate(item)


InputItem = Annotated[
    InputMessage | ItemReference,
    WrapValidator(_check_item),
]


def _text_or_list(value: Any, check_list: ValidatorFunctionWrapHandler) -> Any:
    """Return text unchanged; a union type would report an error for each of its types."""
    return value if isinstance(value, str) else check_list(value)


def _describe_input(schema: dict[str, Any]) -> None:
    messages = {name: schema.pop(name) for name in ("type", "items", "minItems", "maxItems")}
    schema["oneOf"] = [{"type": "string"}, messages]


class TextFormat(BoundedModel):
    """`text.format`; a schema is always followed, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=1024)
    schema_: JSONObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BoundedModel):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(None, description=NO_EFFECT)


_NULL = WithJsonSchema({"type": "null"})
_EMPTY = WithJsonSchema({"type": "object", "maxProperties": 0})
_FALSE = WithJsonSchema({"type": "boolean", "const": False})


class ResponsesRequest(UnusedFields, GenerationBody):
    """The body of POST /v1/responses."""

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        WrapValidator(_text_or_list),
    ] = Field(description="text, or a list of messages", json_schema_extra=_describe_input)
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: MaxTokens | None = Field(None, description=MAX_TOKENS)
    temperature: Temperature | None = setting_field("temperature")
    top_p: TopP | None = setting_field("top_p")
    stream: bool | None = Field(False, description=STREAM)
    text: TextOptions | None = Field(
        None, description="its `format` is text, json_object, or json_schema with `schema`"
    )

    store: bool | None = Field(
        None, description="keep the response for later requests; true by default"
    )
    previous_response_id: str | None = Field(
        None,
        max_length=MAX_ID_CHARACTERS,
        description="a stored response, whose conversation goes before the input",
    )
    background: Annotated[bool | None, refuse("responses are awaited", False), _FALSE] = None
    conversation: Annotated[Any, refuse("use previous_response_id"), _NULL] = None
    include: Annotated[Any, refuse("responses have text only", []), WithJsonSchema(NO_ITEMS)] = None
    reasoning: Annotated[Any, refuse("the model does not reason", {}), _EMPTY] = None
    tools: Tools | None = Field(None, description=NO_EFFECT)
    tool_choice: Literal["auto", "none"] | None = Field(None, description=NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    truncation: Literal["disabled"] | None = Field(None, description=NO_EFFECT)

    @property
    def logged_prompts(self) -> list[str | list[int]]:
        """The texts of the input, without `instructions`, for the request log."""
        if isinstance(self.input, str):
            return [self.input]
        return [item.content for item in self.input if isinstance(item, InputMessage)]

    @property
    def messages(self) -> list[InputMessage]:
        """The messages of the input, whose references are resolved."""
        if isinstance(self.input, str):
            return [InputMessage(role="user", content=self.input, name=None)]
        assert not any(isinstance(item, ItemReference) for item in self.input)
        return cast("list[InputMessage]", self.input)

    @property
    def num_choices(self) -> int:
        """Number of choices that are generated."""
        return 1

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        return {
            "prompt": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "structured_outputs.json": "text.format.schema",
            "structured_outputs": "text.format",
        }
