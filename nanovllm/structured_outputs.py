"""StructuredOutputs: the format of an output, with the field names of vLLM."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError, setting
from nanovllm.vllm_settings import suggests_fields

MAX_GRAMMAR_BYTES = 1 << 16
MAX_CHOICES = 1024
MAX_SCHEMA_DEPTH = 128  # the limit of llguidance's JSON parser
_PARAM = "structured_outputs"


@suggests_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The format of an output; exactly one of the first five attributes is set.

    Attributes:
        json: a JSON schema, as a mapping or text; the output is an instance of it.
        json_object: True for any JSON object.
        regex: a regular expression that the whole output matches (Rust's syntax, no look-around).
        choice: the output is one of these texts.
        grammar: a grammar in Lark's notation with the start rule `start`, or in llama.cpp's GBNF
            (EBNF in vLLM) with the start rule `root`.
        disable_additional_properties: forbid properties that an object of `json` does not declare
            in `properties`, unless its schema has `additionalProperties`. False for the meaning of
            the standard, by which an object may have other properties.

    Raises:
        InvalidRequestError: a value is invalid; the message names it.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    disable_additional_properties: bool = True

    def __post_init__(self) -> None:
        kinds = ("json", "json_object", "regex", "choice", "grammar")
        present = [name for name in kinds if getattr(self, name) is not None]
        if len(present) != 1:
            raise _invalid(
                f"has {', '.join(present) or 'nothing'} but takes exactly one of {', '.join(kinds)}"
            )
        if not isinstance(self.disable_additional_properties, bool):
            raise _invalid("must be true or false", "disable_additional_properties")
        if self.json_object is not None and self.json_object is not True:
            raise _invalid(f"must be true; leave {setting(_PARAM)} out for any text", "json_object")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise _invalid("must be a text that is not empty", name)
        if self.choice is not None:
            self._check_choice()
        if self.json is not None:
            self._check_schema()
        self._check_unicode()
        size = len(self.key)
        if size > MAX_GRAMMAR_BYTES:
            raise _invalid(f"has {size} bytes, the limit is {MAX_GRAMMAR_BYTES}; shorten it")

    @property
    def key(self) -> str:
        """The settings as text, equal for equal settings."""
        is_closed = self.json is not None and self.disable_additional_properties
        return json.dumps(
            [self.json, self.json_object, self.regex, self.choice, self.grammar, is_closed]
        )

    def _check_unicode(self) -> None:
        """Refuse half of a surrogate pair, which JSON can escape."""
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, name)
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                invalid = error.object[error.start : error.end]
                raise _invalid(
                    f"has {invalid!r}, half of a surrogate pair, which is not a character; send "
                    "valid Unicode",
                    name,
                ) from None

    def _check_choice(self) -> None:
        texts = self.choice
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise _invalid("must be a list of texts, none of them empty", "choice")
        if len(texts) > MAX_CHOICES:
            raise _invalid(f"has {len(texts)} entries, the limit is {MAX_CHOICES}", "choice")
        object.__setattr__(self, "choice", tuple(texts))

    def _check_schema(self) -> None:
        schema = self.json
        if isinstance(schema, str):
            if len(schema) > MAX_GRAMMAR_BYTES:
                raise _invalid(
                    f"has {len(schema)} characters, the limit is {MAX_GRAMMAR_BYTES}", "json"
                )
            try:
                schema = json.loads(schema)
                _check_depth(schema)
            except (ValueError, RecursionError) as error:
                raise _invalid(f"is not valid JSON: {error}", "json") from None
        if not isinstance(schema, Mapping):
            kind = type(schema).__name__
            raise _invalid(f"is a {kind} but must be a JSON schema, an object", "json")
        try:
            copy = json.loads(json.dumps(schema, allow_nan=False), parse_int=_checked_int)
            _check_depth(copy)
            object.__setattr__(self, "json", copy)  # the caller cannot change it
        except (TypeError, ValueError, RecursionError) as error:
            raise _invalid(f"cannot be written as JSON: {error}", "json") from None


def _invalid(problem: str, field: str = "") -> InvalidRequestError:
    """Return the error of a field, or of the settings together."""
    name = setting(f"{_PARAM}.{field}" if field else _PARAM)
    return InvalidRequestError(f"{name} {problem}", param=_PARAM)


def _checked_int(digits: str) -> int:
    """Return an integer of a schema. Raises ValueError if it has more than 64 bits."""
    number = int(digits) if len(digits) <= 20 else 1 << 64
    if not -(1 << 63) <= number < 1 << 64:
        shown = digits if len(digits) <= 40 else f"{digits[:40]}..."
        raise ValueError(f"{shown} has more than 64 bits; use a smaller number")
    return number


def _check_depth(schema: object) -> None:
    """Raise ValueError where a schema is nested more deeply than MAX_SCHEMA_DEPTH."""
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep; make it flatter")
