"""The prompt of `nanovllm generate` on a terminal: line editing, history, and slash commands.

readline is in the standard library and adds 5 ms to the start, prompt_toolkit 0.2 s and 4 MB.
Windows has no readline, but its console edits lines and keeps a history by itself.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm.cli.environment import HISTORY_VARIABLE
from nanovllm.cli.options import SAMPLING_OPTIONS
from nanovllm.cli.table import print_rows
from nanovllm.cli.writer import Writer
from nanovllm.errors import InvalidRequestError, counted
from nanovllm.model.kernels.build.object_cache import user_cache_folder
from nanovllm.sampling_params import SamplingParams
from nanovllm.suggestions import suggest

_HISTORY_LINES = 1000
_SETTABLE = (*SAMPLING_OPTIONS, "seed", "stop", "ignore_eos")
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}
_WELCOME = "Type a prompt. /help lists the commands. Ctrl-C stops a completion, Ctrl-D exits."
_HELP = """\
/retry                  repeat the last prompt, with another sample unless a seed is set
/continue               continue the last completion
/clear                  forget the last prompt, and with --chat the conversation
/set                    show the settings
/set NAME VALUE         change a setting, such as /set temperature 0.8; VALUE default resets it
/help                   show this help
/exit                   exit, like Ctrl-D
Any other line is a prompt, and so are several lines between \"\"\" and \"\"\". // begins a prompt
that starts with a slash.
Arrow keys edit the line and browse the history, Ctrl-R searches it."""
_COMMANDS = ("/retry", "/continue", "/clear", "/set", "/help", "/exit", "/quit", "/bye", "/?")
_QUOTES = '"""'


class Repl:
    """Reads prompts and commands from the terminal until the input ends."""

    def __init__(self, writer: Writer) -> None:
        """Complete prompts with `writer`, whose settings the commands change."""
        self._writer = writer
        self._initial = dict(writer.settings)

    def run(self) -> None:
        """Read prompts and commands until /exit or the end of the input."""
        print(_WELCOME, file=sys.stderr)
        with _line_editing():
            for line in _typed_lines():
                if line.startswith("/") and not line.startswith("//"):
                    if self.run_command(line) is False:
                        return
                else:
                    prompt = line[1:] if line.startswith("//") else line
                    self._run(partial(self._writer.answer, prompt))

    def run_command(self, line: str) -> bool:
        """Run a command; return False to exit."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name in ("/help", "/?"):
            print(_HELP)
        elif name == "/set":
            self._set(rest.split(maxsplit=1))
        elif name == "/retry":
            self._run(self._writer.retry)
        elif name == "/continue":
            self._run(self._writer.extend)
        elif name == "/clear":
            self._writer.clear()
        else:
            setting = name[1:].replace("-", "_")
            near = suggest(name, _COMMANDS)
            hint = f"did you mean {near}?" if near else "/help lists the commands"
            if setting in _SETTABLE:
                hint = f"did you mean {' '.join(('/set', setting, rest)).strip()}?"
            print(f"there is no command {name}; {hint}", file=sys.stderr)
        return True

    def _set(self, words: list[str]) -> None:
        if not words:
            print_rows({name: self._value(name) for name in _SETTABLE})
            return
        name = words[0].replace("-", "_")
        if name not in _SETTABLE:
            near = suggest(name, _SETTABLE)
            hint = f"; did you mean {near}?" if near else "; /set shows them"
            print(f"there is no setting {words[0]}{hint}", file=sys.stderr)
            return
        if len(words) == 1:
            print(f"{name} {self._value(name)}")
            return
        try:
            settings = self._changed(name, words[1])
            SamplingParams(**settings)
        except InvalidRequestError as error:
            print(f"{error}", file=sys.stderr)
            return
        self._writer.settings = settings
        print(f"{name} {self._value(name)}")

    def _changed(self, name: str, text: str) -> dict[str, Any]:
        others = {key: value for key, value in self._writer.settings.items() if key != name}
        if text.lower() == "default":
            return {**others, **({name: self._initial[name]} if name in self._initial else {})}
        return {**others, name: _parse(name, text)}

    def _value(self, name: str) -> str:
        """Return a setting for the user."""
        value = getattr(SamplingParams(**self._writer.settings), name)
        if value is None or value in ((), []):
            return "none"
        if isinstance(value, list | tuple):
            return " ".join(map(repr, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _run(self, action: Callable[[], None]) -> None:
        """Print a completion and its speed, or an error."""
        try:
            action()
        except InvalidRequestError as error:
            print(f"{error}", file=sys.stderr)
            return
        except KeyboardInterrupt:  # stops this completion, not the program
            print()
        tokens, duration_s = self._writer.num_tokens, self._writer.duration_s
        speed = f", {tokens / duration_s:,.0f} tokens/s" if duration_s else ""
        print(f"[{counted(tokens, 'token')} in {duration_s:.2f} s{speed}]", file=sys.stderr)


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.lstrip().startswith(_QUOTES):
            text = _quoted_lines(line.lstrip())
            line = f"/{text}" if text.startswith("/") else text
        if line.strip():
            yield line


def _quoted_lines(line: str) -> str:
    """Return the text between three quotes and three quotes; empty after Ctrl-C."""
    text = line.removeprefix(_QUOTES)
    while not text.rstrip().endswith(_QUOTES):
        try:
            text += "\n" + input("... ")
        except EOFError:
            print()
            return text
        except KeyboardInterrupt:
            print()
            return ""
    return text.rstrip().removesuffix(_QUOTES).removeprefix("\n").removesuffix("\n")


@contextmanager
def _line_editing() -> Iterator[None]:
    """Enable readline and its history file for `input`, if readline exists."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_path()
    if path is not None:
        with suppress(OSError):
            readline.read_history_file(path)
    try:
        yield
    finally:
        if path is not None:
            with suppress(OSError):
                _write_history(readline, path)


def history_path() -> Path | None:
    """Return the history file; None if NANOVLLM_HISTORY is empty."""
    named = os.environ.get(HISTORY_VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    return user_cache_folder() / "history"


def _write_history(readline: Any, path: Path) -> None:
    """Write the last lines to a file that only the owner can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    readline.set_history_length(_HISTORY_LINES)
    readline.write_history_file(path)


def _parse(name: str, text: str) -> object:
    """Parse a value; SamplingParams refuses text that is not a number."""
    if name == "stop":
        return text.replace("\\n", "\n")
    if name == "ignore_eos":
        return _TRUTH.get(text.lower(), text)
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
