r"""Chat templates: render messages as the prompt that the model was trained on, and tokenize it.

Templates are Jinja in the dialect of transformers' `apply_chat_template`. A checkpoint has one in
chat_template.jinja or in tokenizer_config.json. It is untrusted: it is compiled and rendered in
Jinja's sandbox, in a process with limits of memory and time (sandbox/template_worker.py).

A model that was not trained to chat has no token that ends a turn. A template for such a model
names strings that end the assistant's turn in a comment at its beginning, as the bundled template
plain.jinja does: `{#- stop_strings: ["\nUser:"] -#}`. Other programs ignore the comment.

Only text that the template wrote can become a special token such as `<|im_start|>`. The same
characters from a message remain ordinary text, also where the template changes, cuts or joins them,
because the text carries its provenance (sandbox/provenance.py). So no message can end its turn and
continue in the name of the system.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from nanovllm.engine.sandbox.process import START_S, WorkerEndedError
from nanovllm.engine.sandbox.process_pool import ProcessPool, WorkerRefusedError
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.model.tokenizer_files import read_tokenizer_config, special_token_text
from nanovllm.sampling_params import MAX_STOP_STRINGS, SamplingParams

PromptEnd: TypeAlias = Literal["generation_prompt", "open", "closed"]
"""What a prompt ends with: the header of the assistant's turn, or the last message, either left
open for the model to continue, or closed."""

MAX_TEMPLATE_CHARACTERS = 256 << 10
MAX_RENDERED_CHARACTERS = 4 << 20
MAX_RENDER_S = 2.0  # processor time; thousands of messages take milliseconds
MAX_RENDER_BYTES = 256 << 20
_MAX_RENDER_WALL_S = 20.0 * MAX_RENDER_S  # a busy machine slows the process down
_MAX_PROCESSES = 2
BUNDLED_TEMPLATES = {"plain": Path(__file__).parent / "plain.jinja"}
"""Templates by name; plain is for models that have none."""

_STOP_STRINGS = re.compile(r"\s*\{#-?\s*stop_strings:\s*(\[.*?\])\s*-?#\}", re.DOTALL)
_MAX_TEMPLATE_STOP_STRINGS = 4

# Defaults of GPT-2's tokenizer; those of other families are named in their files.
_GPT2_SPECIAL_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_SPECIAL_TOKEN_NAMES = (*_GPT2_SPECIAL_TOKENS, "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The text of a prompt, and the ordered ranges of characters that the template wrote."""

    text: str
    spans: Sequence[tuple[int, int]]


class ChatTemplate:
    """One template. Thread-safe."""

    def __init__(
        self, source: str, origin: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Use the template `source`.

        `origin` names it in errors. `special_tokens` are the values of `eos_token` and others, by
        default GPT-2's.
        """
        self.source = source
        self.origin = origin
        self.special_tokens = dict(
            _GPT2_SPECIAL_TOKENS if special_tokens is None else special_tokens
        )

    @classmethod
    def load(
        cls, folder: Path, file: str | Path | None = None, *, source: str | None = None
    ) -> "ChatTemplate | None":
        """Return the template in `source` or `file`, by default that of a model folder.

        A `file` may be the name of a bundled template. Returns None where the folder has none.
        Raises CheckpointError for an invalid file.
        """
        settings = read_tokenizer_config(folder)
        origin = folder / "tokenizer_config.json"
        jinja = folder / "chat_template.jinja"
        if source is not None:
            origin = Path("(passed as text)")
        elif file is not None or jinja.is_file():
            origin = jinja if file is None else BUNDLED_TEMPLATES.get(str(file), Path(file))
            source = _read_text(origin)
        else:
            source = _default_template(settings.get("chat_template"))
        if source is None:
            return None
        return cls(source, str(origin), _special_tokens(settings))

    def is_equal(self, other: "ChatTemplate") -> bool:
        """Return whether both templates render all messages alike."""
        return (self.source, self.special_tokens) == (other.source, other.special_tokens)

    @cached_property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end the assistant's turn; raises CheckpointError."""
        found = _STOP_STRINGS.match(self.source)
        try:
            strings = json.loads(found[1]) if found else []
        except (ValueError, RecursionError):
            strings = None
        if (
            not isinstance(strings, list)
            or not all(isinstance(one, str) and one for one in strings)
            or len(strings) > _MAX_TEMPLATE_STOP_STRINGS
        ):
            raise CheckpointError(
                f"the chat template {self.origin} is not valid: its comment stop_strings must have "
                f"a JSON list of up to {_MAX_TEMPLATE_STOP_STRINGS} strings"
            )
        return tuple(strings)

    def end_turn(self, params: SamplingParams, tokenizer: Tokenizer, vocab: int) -> SamplingParams:
        """Return `params` with what ends the assistant's turn: stop strings and a stop token.

        The token is the template's `eos_token`, whatever `eos_token_id` config.json has. The
        strings are left out for structured outputs, which end where their grammar does, and beyond
        MAX_STOP_STRINGS. Unchanged with `ignore_eos`.
        """
        if params.ignore_eos:
            return params
        token_id = tokenizer.special_tokens.get(self.special_tokens.get("eos_token", ""))
        ids = [] if token_id is None or token_id >= vocab else [token_id]
        stop = params.stop_strings
        if params.structured_outputs is None:
            stop = (*stop, *self.stop_strings)[:MAX_STOP_STRINGS]
        return params.clone(
            stop=stop,
            stop_token_ids=[*(params.stop_token_ids or ()), *ids],
        )

    def check(self) -> None:
        """Raise CheckpointError where the template cannot be compiled."""
        processes = self._processes
        try:
            processes.check()
        except WorkerRefusedError as error:
            raise self._invalid(error) from None
        except WorkerEndedError as error:
            raise CheckpointError(
                f"the chat template {self.origin} cannot be compiled: it {_describe(error.limit)}"
            ) from None

    def close(self) -> None:
        """End the template's processes. A later call starts another one. Idempotent."""
        if "_processes" in self.__dict__:
            self._processes.close()

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        check_text: Callable[[str], None],
        *,
        end: PromptEnd = "generation_prompt",
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Render `messages` and return the token ids of the prompt.

        Args:
            messages: the conversation.
            tokenizer: the model's tokenizer.
            check_text: called with the prompt's text before it is tokenized; may raise.
            end: what the prompt ends with.
            add_special_tokens: add the tokens that the tokenizer puts around every text.

        Raises:
            InvalidRequestError: the template refuses the messages.
            CheckpointError: the template is invalid.
        """
        prompt = self.render(messages, end=end)
        check_text(prompt.text)
        token_ids: list[int] = []
        for index, (part, token_id) in enumerate(split_at_tokens(prompt, tokenizer)):
            token_ids += tokenizer.encode_text(part, is_first=index == 0)
            if token_id is not None:
                token_ids.append(token_id)
        if not add_special_tokens:
            return token_ids
        before, after = tokenizer.tokens_around_text
        return [*before, *token_ids, *after]

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, end: PromptEnd = "generation_prompt"
    ) -> RenderedPrompt:
        """Return the prompt with its provenance. See `encode` for arguments and errors."""
        processes = self._processes
        header = {
            "op": "render", "messages": messages, "special_tokens": self.special_tokens,
            "max_characters": MAX_RENDERED_CHARACTERS, "cpu_s": MAX_RENDER_S,
            "add_generation_prompt": end == "generation_prompt",
            "continue_final_message": end == "open",
        }  # fmt: skip
        try:
            reply, body = processes.call(header, timeout_s=_MAX_RENDER_WALL_S)
        except WorkerRefusedError as error:
            raise self._invalid(error) from None
        except WorkerEndedError as error:
            remedy = "send fewer messages, or start the server with another --chat-template"
            _refuse(f"for these messages the chat template {_describe(error.limit)}; {remedy}")
        if reply["op"] == "refused":
            _refuse(reply["message"])
        if reply["op"] == "failed":
            _refuse(f"the chat template cannot render these messages: {reply['message']}")
        spans = [(first, last) for first, last in reply["spans"]]
        return RenderedPrompt(body.decode("utf-8", "surrogatepass"), spans)

    @cached_property
    def _processes(self) -> ProcessPool:
        if len(self.source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template {self.origin} has {len(self.source)} characters, the limit is "
                f"{MAX_TEMPLATE_CHARACTERS}"
            )
        _ = self.stop_strings  # raise before the template is used
        return ProcessPool(
            "nanovllm.engine.sandbox.template_worker",
            {"op": "load", "memory_bytes": MAX_RENDER_BYTES, "cpu_s": MAX_RENDER_S},
            self.source.encode("utf-8", "surrogatepass"),
            max_processes=_MAX_PROCESSES,
            start_s=START_S + _MAX_RENDER_WALL_S,
        )

    def _invalid(self, error: WorkerRefusedError) -> CheckpointError:
        return CheckpointError(f"the chat template {self.origin} is not valid: {error}")


def split_at_tokens(
    prompt: RenderedPrompt, tokenizer: Tokenizer
) -> Iterator[tuple[str, int | None]]:
    """Split a prompt at the control tokens that the template wrote.

    Yields the text before each token and the token's id, at the end the rest and None.
    """
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


def _describe(limit: str | None) -> str:
    """Return why the process of a template ended."""
    return {
        "time": f"takes more than {MAX_RENDER_S:g} s",
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


def _default_template(setting: object) -> str | None:
    """Return the default of one template or a list of named ones, as in tokenizer_config.json."""
    if isinstance(setting, list):
        named = {
            entry.get("name"): entry.get("template") for entry in setting if isinstance(entry, dict)
        }
        setting = named.get("default")
    return setting if isinstance(setting, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of `eos_token` and others; those that are null or missing are undefined."""
    is_gpt2 = str(settings.get("tokenizer_class") or "GPT2").startswith("GPT2")
    values = {**(_GPT2_SPECIAL_TOKENS if is_gpt2 else {}), **settings}
    texts = {name: special_token_text(values.get(name)) for name in _SPECIAL_TOKEN_NAMES}
    return {name: text for name, text in texts.items() if text is not None}
