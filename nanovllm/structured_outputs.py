"""What an answer must look like: JSON, a regular expression, one of some texts, or a grammar. Field names are vLLM's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 1 << 16
MAX_CHOICES = 1024
_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of these; raises InvalidRequestError naming what is wrong.

    Attributes:
        json: a JSON schema, as a mapping or as text; the answer is a value that it describes.
        json_object: True for any JSON object.
        regex: the whole answer matches it (Rust's syntax, without look-around).
        choice: the answer is one of these texts.
        grammar: a grammar in Lark's notation, whose rule `start` the answer follows.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("json", "json_object", "regex", "choice", "grammar")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            message = f"structured_outputs has {', '.join(given) or 'nothing'} but takes exactly one of json, json_object, regex, choice, grammar"
            raise InvalidRequestError(message, param=_PARAM)
        if self.json_object is not None and self.json_object is not True:
            raise InvalidRequestError(
                "structured_outputs.json_object must be true; leave structured_outputs out for any text",
                param=_PARAM,
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InvalidRequestError(
                    f"structured_outputs.{name} must be a text that is not empty", param=_PARAM
                )
        if self.choice is not None:
            self._check_choice()
        if self.json is not None:
            self._check_schema()
        size = len(self.key.encode("utf-8", errors="replace"))
        if size > MAX_GRAMMAR_BYTES:
            raise InvalidRequestError(
                f"structured_outputs has {size} bytes, the limit is {MAX_GRAMMAR_BYTES}; make it shorter",
                param=_PARAM,
            )

    @property
    def key(self) -> str:
        """All of it as text: equal for equal wishes."""
        return json.dumps([self.json, self.json_object, self.regex, self.choice, self.grammar])

    def _check_choice(self) -> None:
        texts = self.choice
        if (
            isinstance(texts, str)
            or not isinstance(texts, Sequence)
            or not texts
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise InvalidRequestError(
                "structured_outputs.choice must be a list of texts, none of them empty",
                param=_PARAM,
            )
        if len(texts) > MAX_CHOICES:
            raise InvalidRequestError(
                f"structured_outputs.choice has {len(texts)} entries, the limit is {MAX_CHOICES}",
                param=_PARAM,
            )
        object.__setattr__(self, "choice", tuple(texts))

    def _check_schema(self) -> None:
        schema = self.json
        if isinstance(schema, str):
            if len(schema) > MAX_GRAMMAR_BYTES:
                raise InvalidRequestError(
                    f"structured_outputs.json has {len(schema)} characters, the limit is {MAX_GRAMMAR_BYTES}",
                    param=_PARAM,
                )
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError(
                    f"structured_outputs.json is not valid JSON: {error}", param=_PARAM
                ) from None
        if not isinstance(schema, Mapping):
            raise InvalidRequestError(
                f"structured_outputs.json is a {type(schema).__name__} but must be a JSON schema, an object",
                param=_PARAM,
            )
        try:
            object.__setattr__(
                self, "json", json.loads(json.dumps(schema))
            )  # a copy that its giver cannot change
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"structured_outputs.json cannot be written as JSON: {error}", param=_PARAM
            ) from None
