"""The field with the prompts, of completions and embeddings: text, token ids, or a list of either.

One function checks it: a union of four types would report four errors for one fault.
"""

from typing import Annotated, Any

from pydantic import WithJsonSchema

from nanovllm.server.http.bounded_model import as_integer, types_of
from nanovllm.server.http.validation_errors import quote

_PROMPT_FORMS = (
    "must be text, a list of texts, a list of token ids, or a list of lists of token ids"
)
_PROMPT_SCHEMA = {
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
Prompts = Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]


def check_prompts(value: Any) -> Any:
    """Return prompts with token ids as integers; raises ValueError that names the first fault."""
    if value in ("", []):
        raise ValueError("is empty; give text or token ids")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{_PROMPT_FORMS}, not {quote(value)}")
    kinds = types_of(value)
    if kinds == {str}:
        return value
    if kinds == {list}:
        return [_checked_ids(ids, f"list {index}") for index, ids in enumerate(value)]
    if list in kinds or str in kinds:
        raise ValueError(_unlike_first(value))
    return _checked_ids(value, "the list")


def _checked_ids(values: list[Any], name: str) -> list[int]:
    """Return token ids as integers; raises ValueError that names the first wrong entry."""
    if types_of(values) <= {int}:
        return values  # an empty list is refused with its prompt's number
    ids = [as_integer(item) for item in values]
    index = next((index for index, item in enumerate(ids) if type(item) is not int), None)
    if index is None:
        return ids
    problem = f"entry {index} of {name} is {quote(values[index])}, which is no token id"
    if values[index] is None:
        problem += (
            "; lm-eval sends null where it does not know the token that begins a text: "
            "add custom_prefix_token_id=ID to its --model_args"
        )
    raise ValueError(f"{_PROMPT_FORMS}; {problem}")


def _unlike_first(values: list[Any]) -> str:
    """Return the message for a list with texts or lists among other entries."""
    first = type(values[0])
    index = next(index for index, item in enumerate(values) if type(item) is not first)
    return (
        f"{_PROMPT_FORMS}; entry 0 is {quote(values[0])} and entry {index} is "
        f"{quote(values[index])}"
    )


def list_prompts(value: Any) -> list[str | list[int]]:
    """Return the list of prompts in the checked field `prompt`."""
    is_one = isinstance(value, str) or isinstance(value[0], int)
    return [value] if is_one else list(value)
