"""Write the generated pages of docs/reference: options.md, settings.md, and so on.

Run: python tools/make_reference.py [--check]

options.md is made of what `nanovllm COMMAND --help` prints, and of the registry of environment
variables; settings.md of the docstrings and defaults of the settings of the Python API;
ray-serve.md and request-fields.md of the declarations of settings and bodies.
tests/docs/test_reference.py fails if a page is not up to date.
"""

import argparse
import contextlib
import html
import io
import json
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

from annotated_types import Interval
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import (
    BeamSearchParams,
    EngineConfig,
    SamplingParams,
    SpeculativeConfig,
    StructuredOutputs,
)
from nanovllm.checked_fields import checked_fields
from nanovllm.cli.environment import VARIABLES
from nanovllm.cli.main import main as run_command
from nanovllm.deploy.settings import AppSettings, ModelSettings
from nanovllm.server.openai.chat import CHAT
from nanovllm.server.openai.completions import COMPLETIONS
from nanovllm.server.openai.endpoints import ENDPOINTS
from nanovllm.server.openai.schemas import NO_EFFECT, StreamOptions
from nanovllm.server.openai.tokenization import DetokenizeRequest, TokenizeRequest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
SETTINGS: tuple[type, ...] = (
    EngineConfig,
    SamplingParams,
    BeamSearchParams,
    StructuredOutputs,
    SpeculativeConfig,
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
_ABOUT_REQUEST_FIELDS = (
    "The fields of request bodies. Completions and chats have the [sampling "
    "settings](settings.md#samplingparams) too, under the same names; the model's "
    "generation_config.json may change the defaults of `temperature`, `top_p`, `top_k`, `min_p` "
    "and `repetition_penalty`. The [HTTP API](http-api.md) describes endpoints and responses."
)
_UNTITLED = {"positional arguments": ("argument", ""), "options": ("option", "")}
"""Groups of argparse itself, and the heads of their tables."""
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
        FOLDER / "request-fields.md": request_fields_page(),
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
        rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for name, field in checked_fields(kind).items():
            default = "" if field.default is MISSING else f"`{field.default!r}`"
            values = _names(field.choices, repr) or _range(field.bounds)
            rows.append(f"| `{name}` | {default} | {values} | {_cell(field.help)} |")
        parts += [f"## {kind.__name__}", "\n".join(rows)]
    return _joined(parts)


def ray_serve_page() -> str:
    """Return the page of the settings of a Ray Serve application, from their declarations."""
    parts = ["# Ray Serve settings", _NOTE, _ABOUT_RAY_SERVE]
    for title, kind in (("Settings of a model", ModelSettings), ("Application", AppSettings)):
        parts += [f"## {title}", _declared(kind.model_fields)]
    return _joined(parts)


def request_fields_page() -> str:
    """Return the page of the fields of request bodies, from their declarations."""
    completions, chats = COMPLETIONS.body.model_fields, CHAT.body.model_fields
    settings = checked_fields(SamplingParams)

    def is_setting(name: str, field: FieldInfo) -> bool:
        return name in settings and field.description == settings[name].help

    def is_shared(name: str) -> bool:
        return _is_same(completions.get(name), chats.get(name))

    tables = {
        "Completions and chats": {
            name: field
            for name, field in completions.items()
            if is_shared(name) and not is_setting(name, field)
        },
        "stream_options": StreamOptions.model_fields,
    }
    for endpoint in ENDPOINTS:
        own = endpoint.body.model_fields.items()
        tables[f"POST {endpoint.path}"] = {
            name: field
            for name, field in own
            if endpoint not in (COMPLETIONS, CHAT)
            or not (is_shared(name) or is_setting(name, field))
        }
    for path, kind in (("/tokenize", TokenizeRequest), ("/detokenize", DetokenizeRequest)):
        tables[f"POST {path}"] = kind.model_fields
    parts = ["# Request fields", _NOTE, _ABOUT_REQUEST_FIELDS]
    for title, declared in tables.items():
        parts += [f"## {title}", _declared(declared)]
    return _joined(parts)


def _is_same(one: FieldInfo | None, other: FieldInfo | None) -> bool:
    if one is None or other is None:
        return False
    return (one.default, one.description) == (other.default, other.description)


def _declared(declared: Mapping[str, FieldInfo]) -> str:
    """Return a table of pydantic's fields, without those that have no description or effect."""
    rows = ["| field | default | values | meaning |", "|---|---|---|---|"]
    for name, field in declared.items():
        text, _, default = (field.description or "").partition("; default: ")
        if not text or text == NO_EFFECT:
            continue
        if field.default not in (None, PydanticUndefined):
            default = f"`{json.dumps(field.default)}`"
        hint = field.annotation
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        hint = kinds[0] if NoneType in get_args(hint) and len(kinds) == 1 else hint
        is_annotated = get_origin(hint) is Annotated
        hint, *metadata = get_args(hint) if is_annotated else (hint,)
        limits = {
            key: getattr(limit, key)
            for limit in (*field.metadata, *metadata)
            for key in ("gt", "ge", "le")
            if getattr(limit, key, None) is not None
        }
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        values = _names(choices, json.dumps) or _range(Interval(**limits))
        rows.append(f"| `{name}` | {default} | {values} | {_cell(text)} |")
    return "\n".join(rows)


def _names(choices: Sequence[object], spell: Callable[[object], str]) -> str:
    return ", ".join(f"`{spell(choice)}`" for choice in choices)


def _range(bounds: Interval) -> str:
    """Return the bounds that a reader may meet; "" without any."""
    low, limit = bounds.ge if bounds.gt is None else bounds.gt, bounds.le
    has_limit = isinstance(limit, int | float) and limit < _UNLIMITED
    if not isinstance(low, int | float) or low <= -_UNLIMITED:
        return ""
    start = f"above {low}" if bounds.gt is not None else f"{low}"
    if has_limit:
        return f"{start} to {limit}"
    return start if bounds.gt is not None else f"from {start}"


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
