"""Conversations to train on: the prompt of each answer without a loss, the answer with one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.engine.chat.template import ChatTemplate, PromptEnd
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError


class ChatExamples:
    """Renders conversations with the chat template of a model folder."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        """Take the template and the tokenizer of the model."""
        self._template, self._tokenizer = template, tokenizer

    @classmethod
    def load(cls, folder: Path) -> "ChatExamples | None":
        """Load the template and the tokenizer of a folder; None where it has no template."""
        template = ChatTemplate.load(folder) if folder.is_dir() else None
        return None if template is None else cls(template, Tokenizer.load(folder))

    def close(self) -> None:
        """End the processes that render."""
        self._template.close()

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], bool]]:
        """Return the token ids of a conversation, in parts, and whether each is an answer's.

        Raises:
            InvalidRequestError: the template refuses the messages, or it renders an answer
                otherwise than after the prompt with which the model would be asked for it.
        """
        whole = self._encode(messages, asks=False)
        parts: list[tuple[list[int], bool]] = []
        stop = 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self._encode(messages[:number], asks=True)
            answer = self._encode(messages[: number + 1], asks=False)
            if answer[: len(prompt)] != prompt or whole[: len(answer)] != answer:
                raise InvalidRequestError(
                    f"the chat template renders messages[{number}] otherwise than as an answer to "
                    "the messages before it"
                )
            parts += [(whole[stop : len(prompt)], False), (whole[len(prompt) : len(answer)], True)]
            stop = len(answer)
        return [*parts, (whole[stop:], False)] if whole[stop:] else parts

    def _encode(self, messages: Sequence[Mapping[str, Any]], *, asks: bool) -> list[int]:
        end: PromptEnd = "generation_prompt" if asks else "closed"
        return self._template.encode(messages, self._tokenizer, lambda _: None, end=end)
