"""Settings that state their type, bounds and description once, as fields of a dataclass.

steps: int = setting("optimization", 2000, "updates", ge=1, le=2**40)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Text: TypeAlias = Annotated[str, Field(pattern=r"^[^\x00]+$")]
Paths: TypeAlias = Text | Path | Sequence[Text | Path]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def setting(
    group: str,
    default: Any,
    description: str,
    unit: str | None = None,
    choices: Iterable[str] = (),
    **bounds: int,
) -> Any:
    """Return a field that is a `Setting`.

    Args:
        bounds: those of pydantic: `ge` and `le` of an integer, `ge` and perhaps `lt` of a number.
    """
    facts = {"group": group, "description": description, "unit": unit, "choices": tuple(choices)}
    return field(default=default, metadata={**facts, "bounds": bounds})


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as the command line and messages describe it.

    Attributes:
        group: of the options on the command line.
        description: what it does, with its default where that depends on other settings.
        unit: what its value is or counts; None where the name says it.
        choices: the values that it may have; empty if they are not listed.
        type: of a value, or of each path.
        limit: the values that it may have, in words.
    """

    name: str
    group: str
    description: str
    unit: str | None
    choices: tuple[str, ...]
    type: type[int] | type[float] | type[str]
    default: Any
    limit: str
    adapter: "TypeAdapter[Any]"

    def accepts(self, value: object) -> bool:
        """Return whether the setting may have a value."""
        try:
            self.adapter.validate_python(value)
        except ValidationError:
            return False
        return value is None or not self.choices or value in self.choices


def describe_settings(kind: type) -> tuple[Setting, ...]:
    """Return the settings that are the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _describe(one.name, hints[one.name], default=one.default, **one.metadata)
        for one in fields(kind)
    )


def _describe(
    name: str, annotation: Any, *, bounds: Mapping[str, Any], choices: tuple[str, ...], **facts: Any
) -> Setting:
    bounded: Any = Annotated[annotation, Field(**bounds)] if bounds else annotation
    adapter: TypeAdapter[Any] = TypeAdapter(bounded, config=_STRICT)
    value_type: type[int] | type[float] | type[str]
    if choices:
        value_type, limit = str, f"one of {', '.join(choices)}"
    elif "le" in bounds:
        value_type, limit = int, f"an integer from {bounds['ge']} to {bounds['le']}"
    elif bounds:
        below = f" and below {bounds['lt']}" if "lt" in bounds else ""
        value_type, limit = float, f"a number of at least {bounds['ge']}{below}"
    else:
        value_type, limit = str, "paths of text" if annotation == Paths else "text"
    return Setting(
        name=name, type=value_type, choices=choices, limit=limit, adapter=adapter, **facts
    )
