"""A checkpoint's chat template: from messages to the one text that the model was trained to go on from, and to its tokens.

Templates are Jinja in the dialect of transformers' `apply_chat_template`. A checkpoint has one in chat_template.jinja or in
tokenizer_config.json. It is text from somebody else: it runs in Jinja's sandbox, and what it may write and how long it may work are bounded.

Special tokens such as `<|im_end|>` are what the template writes; the same characters in a message are ordinary text, so that nobody can
end his message in the middle and go on in the name of the system.
"""

import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError

MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_RENDERED_CHARACTERS = 4 << 20
MAX_RENDER_S = 2.0  # of processor time: thousands of messages take milliseconds
MAX_NUMBER_BITS = 1 << 16

_GPT2_SPECIAL_TOKENS = dict.fromkeys(
    ("bos_token", "eos_token", "unk_token"), "<|endoftext|>"
)  # where a folder names none
_SPECIAL_TOKEN_NAMES = (*_GPT2_SPECIAL_TOKENS, "pad_token", "sep_token", "cls_token", "mask_token")
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
"""Marks the assistant's text for training; a comment in its place keeps the white space as it is."""


class ChatTemplate:
    """One template; it may be used from any thread."""

    def __init__(
        self, source: str, origin: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """`origin` names it in errors; `special_tokens` are what it calls `eos_token` and the like."""
        self.source = source
        self.origin = origin
        self.special_tokens = {**_GPT2_SPECIAL_TOKENS, **(special_tokens or {})}

    @classmethod
    def load(cls, folder: Path, file: Path | None = None) -> "ChatTemplate | None":
        """The template in `file`, or else that of a model folder; None where it has none. Raises CheckpointError for a file that is damaged."""
        settings = {
            **_read_json(folder / "special_tokens_map.json"),
            **_read_json(folder / "tokenizer_config.json"),
        }
        own = folder / "chat_template.jinja"
        path = file if file is not None else own if own.is_file() else None
        source = (
            _read_text(path)
            if path is not None
            else _default_template(settings.get("chat_template"))
        )
        if source is None:
            return None
        tokens = {name: _token_text(settings.get(name)) for name in _SPECIAL_TOKEN_NAMES}
        origin = str(path or folder / "tokenizer_config.json")
        return cls(
            source, origin, {name: text for name, text in tokens.items() if text is not None}
        )

    def check(self) -> None:
        """Raise CheckpointError where the template is not one."""
        assert self._compiled is not None

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        check_text: Callable[[str], None],
    ) -> list[int]:
        """Token ids of the prompt that asks for an answer to `messages`; `check_text` may refuse its text before time is spent on it.

        Raises InvalidRequestError where the template refuses the messages, CheckpointError where it is not one.
        """
        special = tokenizer.special_tokens
        names = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))
        if not names or not any(
            re.search(names, text) for message in messages for text in _texts(message)
        ):
            text = self.render(messages)
            check_text(text)
            return tokenizer.encode(text, add_special_tokens=False, allow_special=True)
        mark = f"\ue000{secrets.token_hex(8)}\ue001"  # behind the first character of what only looks like a special token
        begun = re.compile(f"(?=(?:{names}))(.)", re.DOTALL)
        marked = [
            {
                key: begun.sub(rf"\1{mark}", value) if isinstance(value, str) else value
                for key, value in message.items()
            }
            for message in messages
        ]
        text = self.render(marked)
        check_text(text.replace(mark, ""))
        token_ids: list[int] = []
        for place, part in enumerate(re.split(f"({names})", text)):
            token_ids += (
                [special[part]]
                if place % 2
                else tokenizer.encode(part.replace(mark, ""), add_special_tokens=False)
            )
        return token_ids

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt as text, the beginning of the assistant's answer included; raises as `encode`."""
        template = self._compiled
        pieces: list[str] = []
        size = 0
        try:
            values = {
                **self.special_tokens,
                "messages": messages,
                "add_generation_prompt": True,
                "tools": None,
                "documents": None,
            }
            with _limited_time(MAX_RENDER_S):
                for piece in template.generate(values):
                    size += len(piece)
                    if size > MAX_RENDERED_CHARACTERS:
                        _refuse(
                            f"the chat template makes more than {MAX_RENDERED_CHARACTERS} characters of the messages; send less"
                        )
                    pieces.append(piece)
        except InvalidRequestError:
            raise
        except _TimeOverError:
            remedy = "send less, or start the server with another --chat-template"
            _refuse(
                f"the chat template works on these messages for more than {MAX_RENDER_S:g} s; {remedy}"
            )
        except (
            Exception
        ) as error:  # whatever a template does with messages that it was not made for
            raise InvalidRequestError(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)

    @cached_property
    def _compiled(self) -> Any:
        if len(self.source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template {self.origin} has {len(self.source)} characters, the limit is {MAX_TEMPLATE_CHARACTERS}"
            )
        environment = _environment()
        try:
            return environment.from_string(_GENERATION_TAG.sub(r"{#\1 \2#}", self.source))
        except (
            Exception
        ) as error:  # one of Jinja's, or of the interpreter where it is nested too deeply
            raise CheckpointError(
                f"the chat template {self.origin} is not valid: {error}"
            ) from error


def _environment() -> Any:
    """The surroundings that transformers gives a template."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415 - only chat needs it; the rest works without
    except ImportError as error:
        raise CheckpointError(
            "chat templates need the package jinja2, which is not installed; pip install jinja2"
        ) from error

    class Environment(ImmutableSandboxedEnvironment):
        """Asks before the two operators that can make anything of nothing, also where both sides are constants."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_size(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _TimeOverError(BaseException):
    """The template has worked for too long; no filter takes it for an error of its own."""


@contextmanager
def _limited_time(limit_s: float) -> Iterator[None]:
    """Raise _TimeOverError in what is called in this block once it has taken `limit_s` of this thread's processor time.

    The interpreter asks `trace` before every line of the functions that the block calls, a template's loops among them: so any loop
    ends, while a thread that waits for a busy machine loses nothing.
    """
    end_s = time.thread_time() + limit_s

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.thread_time() > end_s:
            raise _TimeOverError
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def _check_size(operator: str, left: object, right: object) -> None:
    """Refuse a power or a product that alone would take more time or memory than a prompt is worth."""
    if isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * right
            if operator == "**"
            else left.bit_length() + right.bit_length()
        )
        is_large = bits > MAX_NUMBER_BITS
    else:
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        is_large = (
            isinstance(repeated, Sized)
            and isinstance(times, int)
            and len(repeated) * times > MAX_RENDERED_CHARACTERS
        )
    if is_large:
        _refuse(
            f"the chat template computes something larger than {MAX_RENDERED_CHARACTERS} characters or {MAX_NUMBER_BITS} bits"
        )


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes what HTML would read."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    _refuse(f"the chat template refuses the messages: {message}")


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, param="messages")


def _strftime_now(form: str) -> str:
    return datetime.now(timezone.utc).astimezone().strftime(form)


def _texts(message: Mapping[str, Any]) -> list[str]:
    return [value for value in message.values() if isinstance(value, str)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template {path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A file's settings; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; mend the file, or delete it"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object; mend the file, or delete it")
    return found


def _default_template(given: object) -> str | None:
    """tokenizer_config.json has one template, or a list of named ones, of which this is the default."""
    if isinstance(given, list):
        named = {
            entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)
        }
        given = named.get("default")
    return given if isinstance(given, str) else None


def _token_text(given: object) -> str | None:
    """A special token is written as its text, or as an object that has it."""
    content = given.get("content") if isinstance(given, dict) else given
    return content if isinstance(content, str) else None
