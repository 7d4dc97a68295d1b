"""Format pydantic's validation errors as one message, in JSON's terms: null, true, "text".

Quoted input is truncated, so that a response is never many times larger than its request.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from nanovllm.errors import InvalidRequestError, counted
from nanovllm.server.http.bounded_model import fields_by_name
from nanovllm.server.http.errors import MAX_INPUT_CHARACTERS, shorten
from nanovllm.suggestions import suggest

MAX_PROBLEMS = 10
_MAX_GUESSED_CHARACTERS = 64  # of an unknown field for which one is suggested
_MIN_SIMILARITY = 0.7  # of difflib; at 0.6 it finds truncation_side near functions
_REASONS = {
    "missing": "required",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "string_type": "must be text",
    "string_too_short": "must be text that is not empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_unicode": "must be valid unicode; it has half of a surrogate pair",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
}
"""Messages by pydantic's error type; its own messages name Python types."""


def describe_problems(
    problems: Sequence[Mapping[str, Any]], kind: type[BaseModel]
) -> tuple[str, str | None]:
    """Return one message for pydantic's errors, and the first field at fault."""
    lines = [_describe(problem, kind) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"and {len(problems) - MAX_PROBLEMS} more")
    return "; ".join(lines), _field_of(problems[0]) if problems else None


def quote(value: object) -> str:
    """Return a short form of a JSON value, without visiting all of it."""
    if isinstance(value, str):
        text = json.dumps(value[: MAX_INPUT_CHARACTERS + 1], ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()  # lone surrogates as in JSON
    if isinstance(value, bytes):
        return quote(value.decode(errors="replace"))
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {counted(len(value), 'field')}"
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number of more than 300 digits"
    return json.dumps(value)


def quoted_input(value: object) -> str:
    """Return the end of a message that quotes the client's input."""
    return f" (given: {shorten(quote(value))})"


def _describe(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
    """Format one error: the field, the reason and the input."""
    problem_type, value, path = problem["type"], problem.get("input"), problem["loc"]
    field = shorten(".".join(str(part) for part in path))
    if not field and problem_type == "model_type":
        quoted = quoted_input(value) if value else ""
        return f"the body must be a JSON object, sent with Content-Type: application/json{quoted}"
    reason = _reason(problem, kind)
    if not field:
        return reason
    is_quoted = problem_type == "missing" or (
        problem_type == "value_error" and isinstance(value, list | dict)
    )  # our own messages quote the entry at fault
    return f"{field}: {reason}{'' if is_quoted else quoted_input(value)}"


def _reason(problem: Mapping[str, Any], kind: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        nearest = _nearest_field(problem["loc"], kind)
        return f"not supported{f'; did you mean {nearest}?' if nearest else ''}"
    reason = _REASONS.get(problem["type"])
    if reason is None:
        return shorten(problem["msg"].removeprefix("Value error, "), 400)
    limits = {name: _plain(item) for name, item in problem.get("ctx", {}).items()}
    return reason.format(**limits).replace(" 1 entries", " 1 entry")


def _plain(item: object) -> object:
    """Return a limit in JSON's form: 2 for 2.0, and names in double quotes."""
    if isinstance(item, float) and item.is_integer():
        return int(item)
    return item.replace("'", '"') if isinstance(item, str) else item


def _nearest_field(path: Sequence[int | str], kind: type[BaseModel]) -> str | None:
    """Return the known field closest to the unknown one at `path`."""
    *outer, name = path
    inside: type[BaseModel] | None = kind
    for part in outer:
        if isinstance(part, str) and inside is not None:
            field = fields_by_name(inside).get(part)
            inside = None if field is None else _model_in(field.annotation)
    if inside is None or not isinstance(name, str) or len(name) > _MAX_GUESSED_CHARACTERS:
        return None
    return suggest(name, fields_by_name(inside), min_similarity=_MIN_SIMILARITY)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in models if model is not None), None)


def _field_of(problem: Mapping[str, Any]) -> str | None:
    """Return the field at fault; a check of several fields names it in its error."""
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, InvalidRequestError):
        return error.param
    path = problem["loc"]
    return shorten(path[0]) if path and isinstance(path[0], str) else None
