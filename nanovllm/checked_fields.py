"""Check the fields of a settings dataclass against their annotations, which state each bound once.

    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0

Pydantic reads the same annotations, so the bodies of HTTP requests and their OpenAPI document are
made of them (server/openai/schemas.py).
"""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Interval

from nanovllm.errors import InvalidRequestError

_UNBOUNDED = Interval()
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
}
"""Types of the values of a kind, and what a message calls them."""
_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CheckedField:
    """A field and what its annotation says.

    Attributes:
        value_type: the annotation without None, such as Annotated[int, Interval(ge=0)].
        kind: int, float or bool; None for any other type, which is not checked here.
        choices: the values of a Literal.
        help: the text about the field in the docstring of its class.
    """

    name: str
    value_type: Any
    kind: type | None
    bounds: Interval
    choices: tuple[str, ...]
    is_optional: bool
    default: Any
    help: str

    @property
    def summary(self) -> str:
        """The first sentence of `help`, without its period."""
        return re.split(r"\.(?: |$)", self.help)[0]

    def check(self, value: Any) -> Any:
        """Return a valid value, as a float where the field is one; raises InvalidRequestError."""
        if value is None and self.is_optional:
            return None
        if self.kind is None:
            is_valid = not self.choices or value in self.choices
        else:
            is_kind = isinstance(value, bool) is (self.kind is bool)
            is_kind = is_kind and isinstance(value, _KINDS[self.kind][0])
            is_valid = is_kind and self._is_inside(value)
        if not is_valid:
            raise InvalidRequestError(
                f"{self.name} is {short_repr(value)} but must be {self.expected}", param=self.name
            )
        return float(value) if self.kind is float else value

    def _is_inside(self, value: Any) -> bool:
        bounds = self.bounds
        return (
            (bounds.ge is None or value >= bounds.ge)
            and (bounds.gt is None or value > bounds.gt)
            and (bounds.le is None or value <= bounds.le)
            and (bounds.lt is None or value < bounds.lt)
        )

    @property
    def expected(self) -> str:
        """What a value must be, for a message."""
        if self.kind is None:
            return " or ".join(map(repr, self.choices))
        bounds, (_, expected) = self.bounds, _KINDS[self.kind]
        if bounds.ge is not None and bounds.le is not None:
            return f"{expected}, from {bounds.ge} to {bounds.le}"
        limits = (
            ("above", bounds.gt), ("at least", bounds.ge), ("up to", bounds.le),
            ("below", bounds.lt),
        )  # fmt: skip
        stated = [f"{name} {limit}" for name, limit in limits if limit not in (None, math.inf)]
        return f"{expected}, {' and '.join(stated)}" if stated else expected


@cache
def checked_fields(settings: type) -> Mapping[str, CheckedField]:
    """Return the fields of a dataclass by name."""
    hints = get_type_hints(settings, include_extras=True)
    entries = _ENTRY.findall(inspect.cleandoc(settings.__doc__ or ""))
    texts = {name: " ".join(text.split()) for name, text in entries}
    checked = {}
    for field in fields(settings):
        hint = hints[field.name]
        is_optional = NoneType in get_args(hint)
        value_type = _without_none(hint)
        is_annotated = get_origin(value_type) is Annotated
        plain, *metadata = get_args(value_type) if is_annotated else (value_type,)
        checked[field.name] = CheckedField(
            field.name,
            value_type,
            plain if plain in (int, float, bool) else None,
            next((item for item in metadata if isinstance(item, Interval)), _UNBOUNDED),
            get_args(plain) if get_origin(plain) is Literal else (),
            is_optional,
            field.default,
            texts.get(field.name, ""),
        )
    return checked


def check_fields(settings: Any) -> None:
    """Check all fields of a frozen dataclass; raises InvalidRequestError.

    NumPy scalars become Python numbers, and integers become floats where the field is one.
    """
    for name, field in checked_fields(settings.__class__).items():
        value = getattr(settings, name)
        checked = field.check(to_python(value))
        if checked is not value:
            object.__setattr__(settings, name, checked)


def to_python(value: Any) -> Any:
    """Return a NumPy scalar as a Python number, anything else unchanged."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def short_repr(value: object) -> str:
    """Return the repr of an invalid value for a message, cut at 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _without_none(hint: Any) -> Any:
    """Return the annotation without None: the type of `X | None`, and of others unchanged."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    is_one = NoneType in get_args(hint) and len(kinds) == 1
    return kinds[0] if is_one else hint
