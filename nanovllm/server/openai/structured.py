"""Structured outputs: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.bounded_model import BoundedModel, at_most
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
    """Return a schema unchanged; a union type would report an error for each of its types."""
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
    """Return the settings of both fields; raises InvalidRequestError for a contradiction.

    The type text is OpenAI's default: it sets nothing, also beside `structured_outputs`.
    """
    if response_format is not None:
        if fields is not None and response_format.type != "text":
            raise InvalidRequestError(
                "response_format and structured_outputs both say what the answer looks like; "
                "leave one of them out",
                param="response_format",
            )
        for name, kind in (("value", "json_object"), ("json_schema", "json_schema")):
            if getattr(response_format, name) is not None and response_format.type != kind:
                raise InvalidRequestError(
                    f"response_format.{name} is for the type {kind} only; set the type, or leave "
                    "it out",
                    param="response_format",
                )
    if fields is not None:
        return StructuredOutputs(
            json=fields.json_,
            json_object=fields.json_object,
            regex=fields.regex,
            choice=fields.choice,
            grammar=fields.grammar,
            disable_additional_properties=fields.disable_additional_properties is not False,
        )
    if response_format is None or response_format.type == "text":
        return None
    if response_format.value is not None:
        return StructuredOutputs(json=response_format.value)
    if response_format.type == "json_object":
        return StructuredOutputs(json_object=True)
    if response_format.json_schema is None:
        raise InvalidRequestError(
            "response_format has the type json_schema but no json_schema; add json_schema: "
            "{name, schema}",
            param="response_format",
        )
    return StructuredOutputs(json=response_format.json_schema.schema_)


def structured_field_names(
    response_format: ResponseFormat | None, fields: StructuredFields | None
) -> dict[str, str]:
    """Return the client's fields for structured outputs by the engine's names."""
    if fields is not None:
        return {}
    is_value = response_format is not None and response_format.value is not None
    schema = "value" if is_value else "json_schema.schema"
    return {
        "structured_outputs.json": f"response_format.{schema}",
        "structured_outputs": "response_format",
    }
