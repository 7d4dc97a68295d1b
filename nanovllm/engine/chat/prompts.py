"""ChatPrompts: convert the messages of a Python program to token ids."""

import os
from pathlib import Path
from typing import Any

from nanovllm.engine.chat.template import BUNDLED_TEMPLATES, ChatTemplate, PromptEnd
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams


class ChatPrompts:
    """Renders and tokenizes the conversations with one model. Thread-safe."""

    def __init__(self, folder: Path, input_processor: InputProcessor) -> None:
        """Read templates and special tokens from the model's `folder` on demand."""
        self._folder = folder
        self._input_processor = input_processor
        self._latest: ChatTemplate | None = None

    def close(self) -> None:
        """End the process of the latest template. Idempotent."""
        if self._latest is not None:
            self._latest.close()

    def template(self, chat_template: str | os.PathLike[str] | None = None) -> ChatTemplate:
        """Return the template from its text, file or bundled name, by default the model's own.

        The latest template is cached, with its process.

        Raises:
            InvalidRequestError: there is no template.
            CheckpointError: a file cannot be used.
        """
        if isinstance(chat_template, str) and chat_template not in BUNDLED_TEMPLATES:
            if "{" not in chat_template:
                raise InvalidRequestError(
                    f"chat_template is {chat_template[:80]!r}, which inserts no message; pass "
                    f"{' or '.join(map(repr, BUNDLED_TEMPLATES))}, the text of a Jinja template, "
                    "or the pathlib.Path of a file",
                    param="chat_template",
                )
            template = ChatTemplate.load(self._folder, source=chat_template)
        else:
            template = ChatTemplate.load(
                self._folder, None if chat_template is None else os.fspath(chat_template)
            )
        if template is None:
            raise InvalidRequestError(
                f"{self._folder.name} has no chat template; pass chat_template='plain' or another, "
                "or send a prompt to generate",
                param="messages",
            )
        latest = self._latest
        if latest is None or not latest.is_equal(template):
            latest = self._latest = template
        return latest

    def encode(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        end: PromptEnd = "generation_prompt",
    ) -> list[int]:
        """Return the token ids of a prompt. See ChatTemplate.encode for arguments and errors."""
        processor = self._input_processor
        return template.encode(messages, processor.tokenizer, processor.reader.check_text, end=end)

    def params(self, template: ChatTemplate, params: SamplingParams) -> SamplingParams:
        """Return `params` with what ends a turn of the template."""
        processor = self._input_processor
        return template.end_turn(params, processor.tokenizer, processor.model.vocab)


def prompt_end(*, add_generation_prompt: bool, continue_final_message: bool) -> PromptEnd:
    """Return what a prompt ends with; raises InvalidRequestError where both are set."""
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true; set "
            "add_generation_prompt to false",
            param="continue_final_message",
        )
    if continue_final_message:
        return "open"
    return "generation_prompt" if add_generation_prompt else "closed"
