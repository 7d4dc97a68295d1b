"""argparse with one-line errors, suggestions for misspelled names, and defaults in help texts.

typer, cyclopts and jsonargparse were measured and take 0.15 to 0.4 s longer to start, more than
`nanovllm --help` as a whole (docs/maintainers/lab-notebook.md).
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from nanovllm.cli.environment import variables_help
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.suggestions import suggest

Run = Callable[[argparse.Namespace], int]
Define = Callable[[argparse.ArgumentParser], None]

_TRUTH = {"true": True, "false": False}
_OTHER_COMMANDS = {
    "pull": "download",
    "run": "generate or serve",
    "chat": "generate --chat",
    "ls": "list",
    "rm": "remove",
}
"""Commands by their names in other programs, such as ollama."""


def flag_of(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


def set_up(
    parser: argparse.ArgumentParser,
    run: Run,
    arguments: str,
    description: str,
    variables: Sequence[str] = (),
) -> None:
    """Describe a command in its parser.

    Args:
        run: runs the command with the parsed arguments and returns its exit code.
        arguments: its arguments in the usage line.
        variables: the environment variables that it reads.
    """
    parser.usage = f"%(prog)s {arguments}".strip()
    parser.description = description
    parser.epilog = variables_help(*variables) if variables else None
    parser.set_defaults(run=run)


def imported(target: str) -> Run:
    """Return a function that imports the function `target`, "module:function", and calls it."""

    def run(parsed: argparse.Namespace) -> int:
        with ended_by_interrupts():
            function = resolve_name(target)
        return int(function(parsed))

    return run


def add_commands(
    parser: argparse.ArgumentParser,
    noun: str,
    commands: Mapping[str, tuple[str, Define | None]],
    *,
    is_required: bool = True,
) -> None:
    """Add commands to the main parser, or kinds to that of a command.

    Args:
        noun: what they are called, such as "command".
        commands: the line in the help of each, and the function that defines its parser; None if
            it will not be used.
        is_required: whether one must be named.
    """
    parsers = parser.add_subparsers(
        title=f"{noun}s", required=is_required, metavar=noun.upper(), prog=parser.prog
    )
    for name, (summary, define) in commands.items():
        command = parsers.add_parser(name, help=summary)
        if define is not None:
            define(command)


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, keeps indented lines, and shows the default of every option."""

    def __init__(self, prog: str, **settings: Any) -> None:
        """Leave more room for the names of options than argparse does."""
        super().__init__(prog, **{"max_help_position": 32, **settings})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else textwrap.fill(" ".join(paragraph.split()), width)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text:
            return text
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} (default: {'yes' if action.default else 'no'})"
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """A parser of the whole command line, of a command, or of a command's kind."""

    def __init__(self, **settings: Any) -> None:
        """Accept options by their full names only."""
        super().__init__(**{"formatter_class": HelpFormatter, **settings}, allow_abbrev=False)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse this parser's arguments; an unknown one is an error."""
        joined = None if args is None else self._join_truth_values(args)
        if joined and self._subparsers is not None and joined[0].startswith("-"):
            self._check_first(joined[0])
        if joined == []:
            self._check_subcommand()
        parsed, rest = super().parse_known_args(joined, namespace)
        if rest:
            self.error(self._unrecognized(rest))
        return parsed, rest

    def parse_settings(self, settings: Mapping[str, Any]) -> argparse.Namespace:
        """Return the options with these values, each by its name without dashes.

        Raises ValueError for an unknown name or a wrong value.
        """
        parsed = self.parse_args([])
        for name, value in settings.items():
            flag = flag_of(name)
            action = self._option_string_actions.get(flag)
            if action is None or not (_is_switch(action) or action.nargs is None):
                raise ValueError(self._unrecognized([flag]))
            try:
                setattr(parsed, action.dest, self._setting(flag, action, value))
            except argparse.ArgumentError as error:
                raise ValueError(str(error)) from None
        return parsed

    def _setting(self, flag: str, action: argparse.Action, value: Any) -> Any:
        """Return the value of an option, converted and checked as on the command line."""
        if _is_switch(action):
            is_on = _TRUTH.get(str(value).lower())
            if is_on is None:
                raise argparse.ArgumentError(action, f"{value!r} must be true or false")
            return is_on != flag.startswith("--no-")
        if isinstance(action, argparse._AppendAction):  # noqa: SLF001 - has no other name
            values = value if isinstance(value, list) else [value]
            return [self._get_value(action, str(one)) for one in values]
        if isinstance(value, dict) and action.metavar == "JSON":
            value = json.dumps(value)
        if isinstance(value, list | dict):
            kind = "a list" if isinstance(value, list) else "a mapping"
            raise argparse.ArgumentError(action, f"takes one value, not {kind}")
        converted = self._get_value(action, str(value))
        self._check_value(action, converted)
        return converted

    def error(self, message: str) -> Any:
        """Print the usage of this command, a line, and the error; exit with code 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = list(map(str, action.choices))
        other = _OTHER_COMMANDS.get(str(value), "")
        near = other if other.split(" ")[0] in names else suggest(str(value), names)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - has no other name
            self.error(
                f"there is no {str(action.metavar).lower()} {value}; "
                + (f"did you mean {near}?" if near else f"choose {_alternatives(names)}")
            )
        hint = f"; did you mean {near}?" if near else ""
        raise argparse.ArgumentError(action, f"{str(value)!r} must be {_alternatives(names)}{hint}")

    def _check_first(self, option: str) -> None:
        if option not in self._option_string_actions:
            order = f"the options of a command follow it: {self.format_usage().partition(' ')[2]}"
            self.error(f"unrecognized option {option}; {order.strip()}")

    def _check_subcommand(self) -> None:
        """Refuse an empty command line where a subcommand is required, and name the choices."""
        for action in self._subparsers._group_actions if self._subparsers else ():  # noqa: SLF001
            if action.required and action.choices is not None:
                names = list(map(str, action.choices))
                self.error(f"name the {str(action.metavar).lower()}: {_alternatives(names)}")

    def _unrecognized(self, rest: Sequence[str]) -> str:
        """Return the error for the first unknown argument."""
        first = rest[0].partition("=")[0]
        if not first.startswith("-"):
            taken = [action.metavar for action in self._get_positional_actions() if action.type]
            advice = f"it takes one {taken[-1]}" if taken else "put a text with spaces in quotes"
            return f"unexpected argument {rest[0]!r}; {advice}"
        near = suggest(first, self._option_string_actions)
        hint = f"did you mean {near}?" if near else f"{self.prog} --help lists the options"
        return f"unrecognized option {first}; {hint}"

    def _join_truth_values(self, args: Sequence[str]) -> list[str]:
        """Rewrite `--flag true` and `--flag=false`; argparse would take the value for MODEL."""
        joined: list[str] = []
        rest = list(args)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                return [*joined, argument, *rest]
            flag, equals, value = argument.partition("=")
            action = self._option_string_actions.get(flag)
            if not _is_switch(action):
                joined.append(argument)
                continue
            if not equals and rest and rest[0].lower() in _TRUTH:
                value = rest.pop(0)
            if value and value.lower() not in _TRUTH:
                self.error(f"argument {flag}: {value!r} must be true or false")
            joined += _switch(flag, action, is_on=_TRUTH.get(value.lower(), True))
        return joined


def _alternatives(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _is_switch(action: argparse.Action | None) -> bool:
    """Return whether an option is a switch, which takes no value."""
    return isinstance(action, argparse.BooleanOptionalAction) or (
        action is not None and action.nargs == 0 and action.const is True
    )


def _switch(flag: str, action: argparse.Action | None, *, is_on: bool) -> list[str]:
    if not isinstance(action, argparse.BooleanOptionalAction):
        return [flag] if is_on else []
    name = flag.removeprefix("--no-").removeprefix("--")
    return [f"--{name}" if is_on != flag.startswith("--no-") else f"--no-{name}"]
