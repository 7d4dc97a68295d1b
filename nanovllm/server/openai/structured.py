"""`response_format` as OpenAI has it and `structured_outputs` as vLLM has it: two ways to ask for answers of a form."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.bounds import BoundedModel, at_most
from nanovllm.structured_outputs import MAX_CHOICES, StructuredOutputs

_TEXT = {"type": "string", "minLength": 1}


class JsonSchemaFormat(BoundedModel):
    """`response_format.json_schema`; the schema is always followed, whatever `strict` says."""

    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=1024)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BoundedModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    value: dict[str, Any] | None = Field(
        None, description="the schema of json_object, as huggingface_hub sends it"
    )


def _object_or_text(schema: object) -> object:
    """Return a schema as it came; a union would answer with an error for each of its types."""
    if not isinstance(schema, dict | str):
        raise ValueError("must be a JSON schema, an object or its text")
    return schema


class StructuredFields(BoundedModel):
    """`structured_outputs`: exactly one of the first five fields, and options."""

    json_: Annotated[dict[str, Any] | str, BeforeValidator(_object_or_text)] | None = Field(
        None, alias="json"
    )
    json_object: Annotated[bool, WithJsonSchema({"type": "boolean", "const": True})] | None = None
    regex: Annotated[str, WithJsonSchema(_TEXT)] | None = None
    choice: (
        Annotated[
            list[str],
            Field(fail_fast=True),
            at_most(MAX_CHOICES),
            WithJsonSchema(
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_CHOICES}
            ),
        ]
        | None
    ) = None
    grammar: Annotated[str, WithJsonSchema(_TEXT)] | None = None
    disable_additional_properties: bool | None = None


def structured_outputs(
    response_format: ResponseFormat | None, fields: StructuredFields | None
) -> StructuredOutputs | None:
    """What both fields ask for together; raises InvalidRequestError where they contradict each other or themselves."""
    if fields is not None:
        if response_format is not None and response_format.type != "text":
            message = "response_format and structured_outputs both say what the answer looks like; leave one of them out"
            raise InvalidRequestError(message, param="response_format")
        return StructuredOutputs(
            json=fields.json_,
            json_object=fields.json_object,
            regex=fields.regex,
            choice=fields.choice,
            grammar=fields.grammar,
            disable_additional_properties=fields.disable_additional_properties is not False,
        )
    if response_format is None:
        return None
    for name, kind in (("value", "json_object"), ("json_schema", "json_schema")):
        if getattr(response_format, name) is not None and response_format.type != kind:
            message = (
                f"response_format.{name} is for the type {kind} only; set the type, or leave it out"
            )
            raise InvalidRequestError(message, param="response_format")
    if response_format.type == "text":
        return None
    if response_format.value is not None:
        return StructuredOutputs(json=response_format.value)
    if response_format.type == "json_object":
        return StructuredOutputs(json_object=True)
    if response_format.json_schema is None:
        message = "response_format has the type json_schema but no json_schema; add json_schema: {name, schema}"
        raise InvalidRequestError(message, param="response_format")
    return StructuredOutputs(json=response_format.json_schema.schema_)


def in_sent_fields(
    error: InvalidRequestError, fields: StructuredFields | None, **names: str
) -> InvalidRequestError:
    """Return the engine's error with the names of the fields that the client sent.

    Args:
        fields: the body's structured_outputs; without them response_format asked for a form.
        names: other fields, by the engine's name.
    """
    if fields is None:
        names |= {
            "structured_outputs.json": "response_format.json_schema.schema",
            "structured_outputs": "response_format",
        }
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in names)
    message = re.sub(pattern, lambda found: names[found[0]], str(error)) if names else str(error)
    return type(error)(message, param=names.get(error.param or "", error.param))
