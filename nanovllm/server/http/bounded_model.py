"""The base class of all request bodies: bounded sizes, null means absent, 5.0 is an integer.

Pydantic collects all errors of a body in one call that holds the GIL, so a body with a million
errors would stop the event loop for seconds. Sizes are therefore checked first.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic.fields import FieldInfo

from nanovllm.server.http.json_io import write_json

MAX_FIELDS = 100  # more than any model has; each unknown field costs an error
_CHUNK_VALUES = 1 << 15
_OUTSIDE = (
    "title",
    "description",
    "default",
    "examples",
)  # of `anyOf`, in a schema that also takes null


def allow_nulls(schema: dict[str, Any]) -> None:
    """Allow null in an object's schema for optional and for unknown fields."""
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
    """An object of a request body, refused as a whole if it has too many fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=allow_nulls
    )

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, value: Any) -> Any:
        """Limit the number of fields, drop nulls, and convert 5.0 to an int for integer fields.

        A required field keeps its null, so that the error names the field.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:
            raise ValueError(f"an object of {len(value)} fields, the limit is {MAX_FIELDS}")
        fields, integers = fields_by_name(cls), integer_fields(cls)
        return {
            name: as_integer(item) if name in integers else item
            for name, item in value.items()
            if item is not None or (name in fields and fields[name].is_required())
        }


@cache
def fields_by_name(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a model's fields by their names in JSON."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


@cache
def integer_fields(kind: type[BaseModel]) -> frozenset[str]:
    """Return the names in JSON of a model's integer fields, with or without bounds or None."""
    return frozenset(
        name
        for name, field in fields_by_name(kind).items()
        if any(
            one is int or get_args(one)[:1] == (int,)
            for one in (field.annotation, *get_args(field.annotation))
        )
    )


def as_integer(value: Any) -> Any:
    """Convert an integral float to an int, because some clients write 5 as 5.0."""
    return int(value) if type(value) is float and value.is_integer() else value


def _as_integers(value: object) -> object:
    if isinstance(value, list) and float in types_of(value):
        return [as_integer(item) for item in value]
    return value


INTEGERS = BeforeValidator(_as_integers)
"""Apply `as_integer` to each entry of a list."""


def types_of(values: list[Any]) -> set[type]:
    """Return the types of a list's entries, in chunks that release the GIL in between."""
    starts = range(0, len(values), _CHUNK_VALUES)
    parts: Iterable[set[type]] = (
        {*map(type, values[start : start + _CHUNK_VALUES])} for start in starts
    )
    return set().union(*parts)


def at_most(limit: int) -> BeforeValidator:
    """Return a validator that limits the entries of a list or an object."""

    def check(value: object) -> object:
        if isinstance(value, dict | list) and len(value) > limit:
            raise ValueError(f"has {len(value)} entries, the limit is {limit}")
        return value

    return BeforeValidator(check)


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse what a JSON parser returns, but no JSON in UTF-8 can express."""
    try:
        write_json(value)
    except UnicodeEncodeError:
        raise ValueError(
            "has half of a surrogate pair, which is not a character; send valid Unicode"
        ) from None
    except ValueError:
        raise ValueError(
            "has NaN or infinity, which JSON does not have; send finite numbers"
        ) from None
    return value


JSONObject = Annotated[dict[str, Any], AfterValidator(_check_json)]
"""An object with any fields, which may be written as JSON again."""
