"""Examples in JSON Lines: text of which a part has no loss, such as prompts with their completions.

A line is one of

    {"prompt": "...", "completion": "..."}      the completion has a loss
    {"messages": [{"role": ..., ...}, ...]}     what the assistant writes has a loss
    {"text": "..."}                             everything has a loss

The tokens of all examples follow each other, each example with the end-of-text token at its end,
as GPT-2's documents do. So a window may begin inside an example, and attends to earlier ones. Parts
are encoded one by one: a prompt has the tokens that it has alone, when the model is used, and a
completion those of its continuation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer
from tokenizers import Tokenizer

from nanovllm.errors import NanovllmError, TrainingError
from nanovllm.model.tokenizer_files import without_prefix
from nanovllm.training.data.text import check_is_regular, read_text
from nanovllm.training.data.tokenizer import encode_each, token_type

SUFFIX = ".jsonl"
Part: TypeAlias = tuple[str | Sequence[int], bool]
"""Text or token ids, and whether they have a loss."""


@runtime_checkable
class Chat(Protocol):
    """Renders conversations with a model's chat template."""

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Part]:
        """Return the parts of a conversation; raise NanovllmError if it cannot be rendered."""

    def close(self) -> None:
        """Release what it holds."""


@dataclass(frozen=True, slots=True)
class Example:
    """The parts of an example, in order."""

    parts: tuple[Part, ...]

    @property
    def texts(self) -> list[str]:
        """The parts that are text."""
        return [part for part, _ in self.parts if isinstance(part, str)]


def read_examples(path: Path, chat: Chat | None) -> list[Example]:
    """Read the examples of a file; empty lines are none.

    Args:
        path: file in JSON Lines.
        chat: renders conversations; None if the model has no chat template.

    Raises:
        TrainingError: the file cannot be read, or a line, which is named, is not an example.
    """
    try:
        check_is_regular(path)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None
    examples = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                examples.append(Example(tuple(_parts(line, chat))))
            except NanovllmError as error:
                raise TrainingError(f"{path}, line {number}: {error}") from None
    return examples


def split_examples(
    examples: Sequence[Example], validation_fraction: float
) -> tuple[list[Example], list[Example]]:
    """Return the examples for training, and those for validation: the last ones, at least one."""
    boundary = min(int(len(examples) * (1 - validation_fraction)), len(examples) - 1)
    return list(examples[:boundary]), list(examples[boundary:])


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[Example], end_of_text_id: int | None, description: str
) -> tuple[Integer[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Return the tokens of all examples, and whether each has a loss.

    The end-of-text token has one where the part before it does: so the model learns to end.

    Args:
        end_of_text_id: token at the end of each example; None for none.
        description: of the progress bar.

    Raises:
        TrainingError: the tokenizer cannot encode a character.
    """
    first_texts = [text for one in examples for text in one.texts[:1]]
    later_texts = [text for one in examples for text in one.texts[1:]]
    first = iter(encode_each(tokenizer, first_texts, description))
    later = iter(encode_each(without_prefix(tokenizer), later_texts, description))
    pieces: list[tuple[Sequence[int], bool]] = []
    for example in examples:
        encoded = chain([first], repeat(later))
        pieces += [
            (next(next(encoded)) if isinstance(part, str) else part, has_loss)
            for part, has_loss in example.parts
        ]
        pieces += [] if end_of_text_id is None else [([end_of_text_id], pieces[-1][1])]
    ids = [token_id for piece, _ in pieces for token_id in piece]
    lengths = [len(piece) for piece, _ in pieces]
    has_loss = np.repeat(np.array([has_loss for _, has_loss in pieces], dtype=np.bool_), lengths)
    return np.array(ids, dtype=token_type(tokenizer)), has_loss


def _parts(line: str, chat: Chat | None) -> Sequence[Part]:
    """Return the parts of an example; raise NanovllmError if the line is none."""
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse(f"it is not JSON: {error}")
    if not isinstance(example, dict):
        _refuse(f"it holds a {type(example).__name__}, but must hold an object")
    if "messages" in example:
        return _conversation(example["messages"], chat)
    if "text" in example:
        return [(_text(example, "text"), True)]
    if "prompt" in example and "completion" in example:
        prompt = _text(example, "prompt", may_be_empty=True)
        return [(prompt, False), (_text(example, "completion"), True)]
    names = ", ".join(map(repr, list(example)[:5])) or "nothing"
    raise TrainingError(f"it has {names}, but needs prompt and completion, messages, or text")


def _conversation(messages: object, chat: Chat | None) -> Sequence[Part]:
    if chat is None:
        _refuse(
            "it has messages, but the tokenizer has no chat template; give prompt and completion, "
            "or the folder of a tokenizer with chat_template.jinja (--tokenizer, --init-from)"
        )
    is_list = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
    if not isinstance(messages, list) or not is_list or not messages:
        _refuse("messages must be a list of objects with role and content")
    parts = chat(messages)
    if not any(has_loss for _, has_loss in parts):
        _refuse("it has no message of the assistant, which alone would have a loss")
    return parts


def _text(example: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    text = example[name]
    if not isinstance(text, str):
        _refuse(f"{name} is a {type(text).__name__}, but must be text")
    if not text and not may_be_empty:
        _refuse(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(f"{name} has half of a surrogate pair, which is no character")
    return text


def _refuse(message: str) -> NoReturn:
    raise TrainingError(message)
