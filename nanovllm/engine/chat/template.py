"""A checkpoint's chat template: from messages to the one text that the model was trained to go on from, and to its tokens.

Templates are Jinja in the dialect of transformers' `apply_chat_template`. A checkpoint has one in chat_template.jinja or in
tokenizer_config.json. It is text from somebody else: it is compiled and rendered in Jinja's sandbox, in a process of its own with
limits of memory and time (template_process.py).

Special tokens such as `<|im_start|>` are what the template itself writes. The same characters from a message are ordinary text, also
where the template changes them, cuts them or puts them beside others: which characters it has written is kept with the text
(sandbox/provenance.py), so that nobody can end his message in the middle and go on in the name of the system.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from nanovllm.engine.chat.template_process import (
    TemplateInvalidError,
    TemplateLimitError,
    TemplateProcesses,
)
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError

MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_RENDERED_CHARACTERS = 4 << 20
MAX_RENDER_S = 2.0  # of processor time: thousands of messages take milliseconds
MAX_RENDER_BYTES = 256 << 20

_GPT2_SPECIAL_TOKENS = dict.fromkeys(
    ("bos_token", "eos_token", "unk_token"), "<|endoftext|>"
)  # where a folder names none
_SPECIAL_TOKEN_NAMES = (*_GPT2_SPECIAL_TOKENS, "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as text; `spans` are the ranges of its characters that the template itself has written, in order."""

    text: str
    spans: Sequence[tuple[int, int]]


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
    def load(
        cls, folder: Path, file: Path | None = None, *, source: str | None = None
    ) -> "ChatTemplate | None":
        """Return the template whose text is `source` or in `file`, or else that of a model folder.

        None where the folder has none. Raises CheckpointError for a file that is damaged.
        """
        settings = {
            **_read_json(folder / "special_tokens_map.json"),
            **_read_json(folder / "tokenizer_config.json"),
        }
        own = folder / "chat_template.jinja"
        path = file if file is not None else own if own.is_file() else None
        if source is not None:
            path = Path("(given as text)")
        else:
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
        processes = self._processes
        try:
            processes.check(MAX_RENDER_S)
        except TemplateInvalidError as error:
            raise self._invalid(error) from None
        except TemplateLimitError as error:
            raise CheckpointError(
                f"the chat template {self.origin} cannot be compiled: it {_described(error.limit)}"
            ) from None

    def close(self) -> None:
        """End the processes that render it; a later call starts one for itself. Harmless twice."""
        if "_processes" in self.__dict__:
            self._processes.close()

    def end_of_turn_id(self, tokenizer: Tokenizer) -> int | None:
        """Return the id of the token that ends a turn, the template's `eos_token`; None where it has none.

        It ends the assistant's answer, whichever token config.json calls the end of text.
        """
        return tokenizer.special_tokens.get(self.special_tokens["eos_token"])

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        check_text: Callable[[str], None],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the token ids of the prompt that `messages` make.

        Args:
            tokenizer: the model's.
            check_text: may refuse the prompt's text before time is spent on it.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: end in the middle of the last message, which goes on.
            add_special_tokens: with those that the tokenizer puts around every text.

        Raises:
            InvalidRequestError: the template refuses the messages.
            CheckpointError: the template is not one.
        """
        prompt = self.render_prompt(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        check_text(prompt.text)
        token_ids: list[int] = []
        for part, token_id in split_at_tokens(prompt, tokenizer):
            token_ids += tokenizer.encode_text(part)
            if token_id is not None:
                token_ids.append(token_id)
        if not add_special_tokens:
            return token_ids
        before, after = tokenizer.tokens_around_text
        return [*before, *token_ids, *after]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt as text, the beginning of the assistant's answer included; raises as `encode`."""
        return self.render_prompt(messages).text

    def render_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> RenderedPrompt:
        """Return the prompt as text and what of it the template wrote; arguments and errors are those of `encode`."""
        processes = self._processes
        try:
            answer, body = processes.render(
                messages,
                self.special_tokens,
                max_characters=MAX_RENDERED_CHARACTERS,
                cpu_s=MAX_RENDER_S,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except TemplateInvalidError as error:
            raise self._invalid(error) from None
        except TemplateLimitError as error:
            remedy = "send less, or start the server with another --chat-template"
            _refuse(f"for these messages the chat template {_described(error.limit)}; {remedy}")
        if answer["op"] == "refused":
            _refuse(answer["message"])
        if answer["op"] == "failed":
            _refuse(f"the chat template cannot render these messages: {answer['message']}")
        spans = [(start, end) for start, end in answer["spans"]]
        return RenderedPrompt(body.decode("utf-8", "surrogatepass"), spans)

    @cached_property
    def _processes(self) -> TemplateProcesses:
        if len(self.source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template {self.origin} has {len(self.source)} characters, the limit is {MAX_TEMPLATE_CHARACTERS}"
            )
        if importlib.util.find_spec("jinja2") is None:
            raise CheckpointError(
                "chat templates need the package jinja2, which is not installed; pip install jinja2"
            )
        return TemplateProcesses(self.source, memory_bytes=MAX_RENDER_BYTES)

    def _invalid(self, error: TemplateInvalidError) -> CheckpointError:
        return CheckpointError(f"the chat template {self.origin} is not valid: {error}")


def split_at_tokens(
    prompt: RenderedPrompt, tokenizer: Tokenizer
) -> Iterator[tuple[str, int | None]]:
    """Yield the text up to each token that the template has spelled out, and its id; at the end the rest, and None."""
    tokens = tokenizer.control_tokens
    names = "|".join(re.escape(name) for name in sorted(tokens, key=len, reverse=True))
    begin = 0
    strips_next = False
    for start, end in prompt.spans if names else ():
        for match in re.finditer(names, prompt.text[start:end]):
            token = tokens[match[0]]
            part = prompt.text[begin : start + match.start()]
            part = part.lstrip() if strips_next else part
            yield part.rstrip() if token.strips_left else part, token.token_id
            begin, strips_next = start + match.end(), token.strips_right
    rest = prompt.text[begin:]
    yield rest.lstrip() if strips_next else rest, None


def _described(limit: str | None) -> str:
    """Return what a template did whose process has ended."""
    return {
        "time": f"works for more than {MAX_RENDER_S:g} s",
        "memory": f"needs more than {MAX_RENDER_BYTES >> 20} MiB of memory",
        "stack": "is nested too deeply",
    }.get(limit or "", "ended its process")


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, param="messages") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template {path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A file's settings; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; mend the file, or delete it"
        ) from None
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
