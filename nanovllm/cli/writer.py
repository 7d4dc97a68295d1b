"""Streams completions, or the answers of a conversation, to standard output."""

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.engine.chat.prompts import ChatPrompts
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import ContextLengthError, EngineFaultError, InvalidRequestError
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams


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
        start_s = time.perf_counter()
        try:
            with closing(self.engine.run([prepared])) as steps:
                for _ in steps:
                    delta = prepared.take_delta()
                    if delta is not None and delta.outputs[0].text:
                        self.text += delta.outputs[0].text
                        print(delta.outputs[0].text, end="", flush=True)
            print()
        finally:
            self.num_tokens = prepared.num_output_tokens
            self.duration_s = time.perf_counter() - start_s
        if prepared.error is not None:
            raise EngineFaultError(prepared.error)
        limit = prepared.requests[0].max_new_tokens
        wanted = SamplingParams(**self.settings).max_tokens
        if prepared.ended(0) == (FinishReason.LENGTH, limit) and wanted != limit:
            context = self.engine.max_model_len
            print_message(f"the text ends at the model's context of {context:,} tokens")


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
                self.template, messages, "open" if is_continued else "generation_prompt"
            )
            return self._prepare(token_ids, params)
        except ContextLengthError as error:
            raise ContextLengthError(f"{error}; /clear begins a new conversation") from None


def _existing(text: str) -> str:
    """Return the text; raises InvalidRequestError if it is empty."""
    if not text:
        raise InvalidRequestError("there is nothing yet to repeat or continue; type a prompt first")
    return text
