"""What all objects of a body have in common: bounded sizes, null means left out, and 5.0 is a whole number.

Each fault that pydantic finds costs time and memory, and it collects all of them in one call that
keeps the interpreter, so that a body of a million faults would stop the event loop for seconds.
Sizes are checked first instead.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.fields import FieldInfo

MAX_FIELDS = 100  # more than there are to know; each unknown one costs an error of its own
_CHUNK_VALUES = 1 << 15
_OUTSIDE = ("title", "description", "default", "examples")  # of a schema that gets a null beside it


def allow_nulls(schema: dict[str, Any]) -> None:
    """Add null to the schema of an object where the server takes it: for optional and for unknown fields."""
    required = schema.get("required", ())
    for name, described in schema.get("properties", {}).items():
        if name not in required and not _has_null(described):
            kept = {key: value for key, value in described.items() if key in _OUTSIDE}
            inner = {key: value for key, value in described.items() if key not in _OUTSIDE}
            schema["properties"][name] = {"anyOf": [inner, {"type": "null"}], **kept}
    if schema.get("additionalProperties") is False:
        schema["additionalProperties"] = {"type": "null"}


def _has_null(schema: Mapping[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in (schema, *schema.get("anyOf", ())))


class BoundedModel(BaseModel):
    """An object of a body. One with too many fields is refused as a whole."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=allow_nulls
    )

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        """Count the fields before they are looked at, drop nulls, and make 5.0 an int where one belongs.

        A required field keeps its null, whose error then names it.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"an object of {len(value)} fields, the limit is {MAX_FIELDS}")
        fields = fields_by_name(cls)
        return {
            name: as_integer(item) if _is_integer(fields.get(name)) else item
            for name, item in value.items()
            if item is not None or (name in fields and fields[name].is_required())
        }


@cache
def fields_by_name(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model under the names that clients use."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _is_integer(field: FieldInfo | None) -> bool:
    """Return whether a field takes an integer and no other number."""
    return field is not None and (field.annotation is int or int in get_args(field.annotation))


def as_integer(value: Any) -> Any:
    """Return a float without a fraction as an int; some programs write 5 as 5.0. Others as they are."""
    return int(value) if type(value) is float and value.is_integer() else value


def _as_integers(value: object) -> object:
    if isinstance(value, list) and float in types_of(value):
        return [as_integer(item) for item in value]
    return value


INTEGERS = BeforeValidator(_as_integers)
"""Applies `as_integer` to each entry of a list."""


def types_of(values: list[Any]) -> set[type]:
    """Return the types of a list's entries, by calls that are fast and let other threads run between them."""
    starts = range(0, len(values), _CHUNK_VALUES)
    parts: Iterable[set[type]] = ({*map(type, values[at : at + _CHUNK_VALUES])} for at in starts)
    return set().union(*parts)


def at_most(limit: int) -> BeforeValidator:
    """Count the entries of a list or an object before they are looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict | list) and len(value) > limit:
            raise ValueError(f"has {len(value)} entries, the limit is {limit}")
        return value

    return BeforeValidator(check)
