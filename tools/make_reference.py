"""Write the generated pages of docs/reference: options.md, settings.md and ray-serve.md.

Run: python tools/make_reference.py [--check]

options.md is made of what `nanovllm COMMAND --help` prints, and of the registry of environment
variables; settings.md of the docstrings and defaults of the settings of the Python API;
ray-serve.md of the declarations of its settings.
tests/docs/test_reference.py fails if a page is not up to date.
"""

import argparse
import contextlib
import html
import io
import os
import re
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import BeamSearchParams, EngineConfig, SamplingParams, StructuredOutputs
from nanovllm.cli.environment import VARIABLES
from nanovllm.cli.main import main as run_command
from nanovllm.deploy.settings import AppSettings, ModelSettings

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
SETTINGS: tuple[type[Any], ...] = (
    EngineConfig,
    SamplingParams,
    BeamSearchParams,
    StructuredOutputs,
)
_ABOUT_OPTIONS = (
    "What `nanovllm COMMAND --help` prints. [Commands](command-line.md) explains how the commands "
    "behave."
)
_ABOUT_SETTINGS = (
    "The settings of the [Python API](python-api.md), with their defaults. Requests of the "
    "[HTTP API](http-api.md) have the fields of SamplingParams under the same names."
)
_ABOUT_RAY_SERVE = (
    "The `args` of an application of `nanovllm.deploy`, as in "
    "[two-replicas.yaml](../../examples/ray/two-replicas.yaml). "
    "`python -m nanovllm.deploy.check FILE` checks a file. "
    "[Scale out](../how-to/scale-out.md#ray-serve) explains how to use it."
)
_UNTITLED = {"positional arguments": ("argument", ""), "options": ("option", "")}
"""Groups of argparse itself, and the heads of their tables."""
_UNIONS = (Union, types.UnionType)
_UNLIMITED = 2**30
"""Bounds beyond this are those of the sampler's arrays."""
_WIDTH = "2000"  # columns: no line of a help text is wrapped
_SHORT = re.compile(r"^(-\w) [A-Z]+, ")
"""The begin of "-i FILE, --input FILE", which Python 3.13 writes as "-i, --input FILE"."""
_NOTE = "<!-- Written by tools/make_reference.py. Do not edit. -->"


@dataclass(frozen=True, slots=True)
class Option:
    """A row of a help text: an option or an argument as it is written, and its description."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """The help text of a command; `groups` are its options by the title of their group."""

    name: str
    usage: str
    groups: Mapping[str, Sequence[Option]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; return 1 if one is not up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parsed = parser.parse_args(arguments)
    status = 0
    for path, text in pages().items():
        if not parsed.check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            print(f"{path} is not up to date; run python tools/make_reference.py", file=sys.stderr)
            status = 1
    return status


def pages() -> dict[Path, str]:
    """Return the text of every generated page."""
    return {
        FOLDER / "options.md": options_page(list(read_commands())),
        FOLDER / "settings.md": settings_page(),
        FOLDER / "ray-serve.md": ray_serve_page(),
    }


def read_commands(*parents: str) -> Iterator[Command]:
    """Read the help text of each command below `parents`."""
    groups = read_help(*parents).groups
    for title in ("commands", "kinds"):
        for option in groups.get(title, ()):
            if not option.text:  # the placeholder COMMAND
                continue
            command = read_help(*parents, option.name)
            if {"commands", "kinds"} & command.groups.keys():
                yield from read_commands(*parents, option.name)
            else:
                yield command


def read_help(*words: str) -> Command:
    """Return what `nanovllm WORDS --help` prints."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _WIDTH
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            run_command([*words, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return parse_help(" ".join(("nanovllm", *words)), printed.getvalue())


def parse_help(name: str, text: str) -> Command:
    """Read a help text of argparse in which no line is wrapped."""
    groups: dict[str, list[Option]] = {}
    title = ""
    for line in text.splitlines():
        if re.match(r"\w[\w ]*:$", line):
            title = line.removesuffix(":")
        elif line.startswith(" ") and title and title != "environment variables":
            rows = groups.setdefault(title, [])
            if match := re.match(r" {2,4}(\S.*?)(?: {2,}(\S.*))?$", line):
                rows.append(Option(_SHORT.sub(r"\1, ", match[1]), match[2] or ""))
            elif line.strip() and rows and not rows[-1].text:  # below a long name
                rows[-1] = Option(rows[-1].name, line.strip())
    usage = text.partition("\n")[0].removeprefix("usage: ")
    return Command(name, usage, {title: rows for title, rows in groups.items() if rows})


def options_page(commands: Sequence[Command]) -> str:
    """Return the page of all options; those of several commands are listed once."""
    shared = _shared(commands)
    parts = [
        "# All options",
        _NOTE,
        _ABOUT_OPTIONS,
        *_environment(),
    ]
    for command in commands:
        parts += [f"## {command.name}", f"`{command.usage}`"]
        for title, options in command.groups.items():
            common = shared.get(title, [])
            own = [one for one in options if one not in common and not one.name.startswith("-h, ")]
            if own:
                parts.append(_table(title, own))
            if any(option in common for option in options):
                parts.append(f"And [options of the {title}](#options-of-the-{title}).")
    for title, options in shared.items():
        parts += [f"## Options of the {title}", _table(title, options)]
    return _joined(parts)


def _shared(commands: Sequence[Command]) -> dict[str, list[Option]]:
    """Return the groups of options that several commands have, which are listed once."""
    counts = Counter(
        (title, option)
        for command in commands
        for title, options in command.groups.items()
        for option in options
        if title not in _UNTITLED
    )
    shared: dict[str, dict[str, Option]] = {}
    for (title, option), count in counts.most_common():
        if count > 1:
            shared.setdefault(title, {}).setdefault(option.name, option)
    return {title: list(found.values()) for title, found in shared.items() if len(found) > 1}


def settings_page() -> str:
    """Return the page of the settings of the Python API, from their docstrings."""
    parts = [
        "# Settings",
        _NOTE,
        _ABOUT_SETTINGS,
    ]
    for kind in SETTINGS:
        texts = attributes(kind)
        hints = get_type_hints(kind, include_extras=True)
        rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for field in fields(kind):
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            values, text = _values(hints[field.name]), _cell(texts[field.name])
            rows.append(f"| `{field.name}` | {default} | {values} | {text} |")
        parts += [f"## {kind.__name__}", "\n".join(rows)]
    return _joined(parts)


def ray_serve_page() -> str:
    """Return the page of the settings of a Ray Serve application, from their declarations."""
    parts = ["# Ray Serve settings", _NOTE, _ABOUT_RAY_SERVE]
    for title, kind in (("Settings of a model", ModelSettings), ("Application", AppSettings)):
        rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for name, field in kind.model_fields.items():
            text, _, default = (field.description or "").partition("; default: ")
            if field.default not in (None, PydanticUndefined):
                default = f"`{field.default!r}`"
            limits = {
                key: getattr(limit, key)
                for limit in field.metadata
                for key in ("gt", "ge", "le")
                if hasattr(limit, key)
            }
            values = _range(Interval(**limits)) if limits else _values(field.annotation)
            rows.append(f"| `{name}` | {default} | {values} | {_cell(text)} |")
        parts += [f"## {title}", "\n".join(rows)]
    return _joined(parts)


def _values(hint: Any) -> str:
    """Return the names or the bounds that an annotation allows; "" where it says neither."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value!r}`" for value in get_args(hint))
    if get_origin(hint) is Annotated:
        bounds = next(item for item in hint.__metadata__ if isinstance(item, Interval))
        return _range(bounds)
    inner = [_values(part) for part in get_args(hint) if get_origin(hint) in _UNIONS]
    return next(filter(None, inner), "")


def _range(bounds: Interval) -> str:
    low = f"above {bounds.gt}" if bounds.gt is not None else f"{bounds.ge}"
    has_limit = bounds.le is not None and float(bounds.le) < _UNLIMITED  # type: ignore[arg-type]
    if bounds.ge is not None and float(bounds.ge) <= -_UNLIMITED:  # type: ignore[arg-type]
        return ""
    if has_limit:
        return f"{low} to {bounds.le}"
    return low if bounds.gt is not None else f"from {low}"


def attributes(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions below "Attributes:" in a docstring, by name."""
    section = (kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _environment() -> list[str]:
    rows = ["| variable | effect | default |", "|---|---|---|"]
    for name, variable in VARIABLES.items():
        rows.append(f"| `{name}` | {_cell(variable.effect)} | {_cell(variable.default)} |")
    return ["## Environment variables", "\n".join(rows)]


def _table(title: str, options: Sequence[Option]) -> str:
    name, about = _UNTITLED.get(title, ("option", title))
    lines = [f"| {name} | {about} |", "|---|---|"]
    lines += [f"| {_cell(f'`{option.name}`')} | {_cell(option.text)} |" for option in options]
    return "\n".join(lines)


def _joined(parts: Sequence[str]) -> str:
    """Join paragraphs and tables, with lines of at most 100 columns where they may be wrapped."""
    fill = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False).fill
    wrapped = (part if part.startswith(("|", "#", "<")) else fill(part) for part in parts)
    return "\n\n".join(wrapped) + "\n"


def _cell(text: str) -> str:
    """Escape what Markdown would read in a cell of a table, where code must not contain a bar."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = re.sub(r"([|<>*])", r"\\\1", part)
        elif "|" in part:
            parts[index] = f"<code>{html.escape(part).replace('|', '&#124;')}</code>"
        else:
            parts[index] = f"`{part}`"
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main())
