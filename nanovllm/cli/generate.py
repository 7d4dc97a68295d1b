"""`nanovllm generate`: stream completions of one or several prompts to the terminal."""

import argparse
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.options import (
    DEFAULT_MAX_TOKENS,
    engine_config,
    load_chat_template,
    sampling_settings,
)
from nanovllm.cli.repl import Repl, read_lines_of
from nanovllm.config import BUNDLED_MODELS
from nanovllm.engine.chat.prompts import ChatPrompts
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.errors import ContextLengthError, EngineFaultError, InvalidRequestError
from nanovllm.hub import resolve_model
from nanovllm.hub.downloads import full_name
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams


def run(parsed: argparse.Namespace) -> int:
    """Complete the prompt, or each line of the input; return the exit code."""
    model, prompt = model_and_prompt(parsed)
    settings = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_settings(parsed)}
    SamplingParams(**settings)  # report a wrong option before the model is loaded
    folder = resolve_model(model)
    is_chat = parsed.chat or parsed.chat_template is not None
    template = load_chat_template(folder, parsed) if is_chat else None
    if is_chat and template is None:
        raise ValueError(f"{folder.name} has no chat template; give --chat-template plain")
    engine = Engine.load(folder, engine_config(parsed))
    settings = {**engine.sampling_defaults, **settings}
    if template is None:
        return _answer_all(Writer(engine, settings), prompt)
    chats = ChatPrompts(folder, engine.input_processor)
    with closing(template):
        return _answer_all(ChatWriter(engine, settings, chats=chats, template=template), prompt)


def _answer_all(writer: "Writer", prompt: str | None) -> int:
    """Answer the prompt, or those of the terminal or standard input; return the exit code."""
    if prompt is not None:
        writer.answer(prompt)
        return 0
    if sys.stdin.isatty():
        Repl(writer).run()
        return 0
    for line in read_lines_of(sys.stdin):
        try:
            writer.answer(line)
        except InvalidRequestError as error:
            print(f"{error}", file=sys.stderr)
        except KeyboardInterrupt:  # stops this completion, not the program
            print()
    return 0


def model_and_prompt(parsed: argparse.Namespace) -> tuple[str, str | None]:
    """Return the arguments' model and prompt, which may be None; raises ValueError for two of one.

    A single argument is the prompt even if it names a model, so that text of any origin never loads
    a model; a message says so.
    """
    texts, model = list(parsed.texts), str(parsed.model)
    if len(texts) > 2 or (len(texts) == 2 and hasattr(parsed, "named_model")):
        raise ValueError(
            f"generate takes one prompt but {len(texts)} are given; "
            "put a prompt with spaces in quotes"
        )
    if len(texts) == 2:
        model = texts.pop(0)
    prompt = texts[0] if texts else None
    if prompt is not None and len(parsed.texts) == 1 and _is_model_name(prompt):
        print_message(
            f"{prompt} is taken as the prompt; for the model: nanovllm generate --model {prompt}"
        )
    return model, prompt


def _is_model_name(text: str) -> bool:
    if text in BUNDLED_MODELS or full_name(text) != text:
        return True
    try:
        return (Path(text) / "config.json").is_file()
    except (OSError, ValueError):  # no file can have such a name
        return False


@dataclass(slots=True)
class Writer:
    """Prints completions on standard output; `settings` of the sampler may change between them.

    Attributes:
        num_tokens: generated tokens of the last completion.
        duration_s: time that it took.
        prompt: the last prompt; empty before the first.
        text: the prompt and its completion.
    """

    engine: Engine
    settings: dict[str, Any]
    num_tokens: int = 0
    duration_s: float = 0.0
    prompt: str = ""
    text: str = ""

    def answer(self, prompt: str) -> None:
        """Stream the prompt and its completion."""
        prepared = self._prepare(prompt, SamplingParams(**self.settings))
        self.prompt = self.text = prompt
        print(prompt, end="", flush=True)
        self._write(prepared)

    def retry(self) -> None:
        """Stream another completion of the last prompt."""
        self.answer(_existing(self.prompt))

    def extend(self) -> None:
        """Continue the last completion."""
        self._write(self._prepare(_existing(self.text), SamplingParams(**self.settings)))

    def clear(self) -> None:
        """Forget the last prompt."""
        self.prompt = self.text = ""

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> PromptRequest:
        """Check a prompt; raises InvalidRequestError."""
        request = GenerationRequest(prompts=[prompt], params=params, request_id="generate")
        (processed,) = self.engine.input_processor.process(request)
        return processed

    def _write(self, prepared: PromptRequest) -> None:
        """Print the pieces of a completion, and add them to `text`."""
        start_s, before = time.perf_counter(), self.engine.stats().generation_tokens
        try:
            with closing(self.engine.run([prepared])) as steps:
                for _ in steps:
                    delta = prepared.take_delta()
                    if delta is not None and delta.outputs[0].text:
                        self.text += delta.outputs[0].text
                        print(delta.outputs[0].text, end="", flush=True)
            print()
        finally:
            self.num_tokens = self.engine.stats().generation_tokens - before
            self.duration_s = time.perf_counter() - start_s
        if prepared.error is not None:
            raise EngineFaultError(prepared.error)


@dataclass(slots=True, kw_only=True)
class ChatWriter(Writer):
    """Prints the answers of a conversation. `text` is the last answer.

    Attributes:
        messages: the conversation up to the last message of the user.
    """

    chats: ChatPrompts
    template: ChatTemplate
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, prompt: str) -> None:
        """Stream the answer to a message."""
        answered = [{"role": "assistant", "content": self.text}] if self.messages else []
        messages = [*self.messages, *answered, {"role": "user", "content": prompt}]
        prepared = self._prepare_chat(messages)
        self.messages, self.prompt, self.text = messages, prompt, ""
        self._write(prepared)

    def retry(self) -> None:
        """Stream another answer to the last message."""
        _existing(self.prompt)
        prepared = self._prepare_chat(self.messages)
        self.text = ""
        self._write(prepared)

    def extend(self) -> None:
        """Continue the last answer."""
        begun = {"role": "assistant", "content": _existing(self.text)}
        self._write(self._prepare_chat([*self.messages, begun], is_continued=True))

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages, self.prompt, self.text = [], "", ""

    def _prepare_chat(
        self, messages: list[dict[str, str]], *, is_continued: bool = False
    ) -> PromptRequest:
        params = self.chats.params(self.template, SamplingParams(**self.settings))
        try:
            token_ids = self.chats.encode(
                self.template,
                messages,
                add_generation_prompt=not is_continued,
                continue_final_message=is_continued,
            )
            return self._prepare(token_ids, params)
        except ContextLengthError as error:
            raise ContextLengthError(f"{error}; /clear begins a new conversation") from None


def _existing(text: str) -> str:
    """Return the text; raises InvalidRequestError if it is empty."""
    if not text:
        raise InvalidRequestError("there is nothing yet to repeat or continue; type a prompt first")
    return text
