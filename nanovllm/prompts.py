"""The forms that a prompt may have in Python; the names are vLLM's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from nanovllm.errors import InvalidRequestError


class TextPrompt(TypedDict):
    """A prompt that is text."""

    prompt: str


TokenIds: TypeAlias = Sequence[int] | Sequence[np.integer[Any]] | npt.NDArray[np.integer[Any]]


class TokensPrompt(TypedDict):
    """A prompt that is token ids."""

    prompt_token_ids: TokenIds


Prompt: TypeAlias = str | TokenIds | TextPrompt | TokensPrompt | Mapping[str, object]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return the prompts that `prompts` is: one, or an iterable of several.

    Whole numbers are the token ids of one prompt; a NumPy array of two dimensions has one prompt
    a row. Raises InvalidRequestError for what is neither a prompt nor an ordered iterable.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    given: Any = to_list(prompts)
    if isinstance(given, bytes | bytearray | memoryview | set | frozenset) or not isinstance(
        given, Iterable
    ):
        raise InvalidRequestError(
            f"prompts is a {type(prompts).__name__} but must be a prompt or a list of prompts",
            param="prompt",
        )
    listed = list(given)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]
    return listed


def to_list(values: object) -> Any:
    """Return the nested lists of an array that has the method `tolist`, anything else as it is."""
    convert = getattr(values, "tolist", None)
    return convert() if callable(convert) and not isinstance(values, memoryview) else values


def to_python_ids(token_ids: Sequence[Any]) -> list[Any]:
    """Return a list whose NumPy integers are Python's; everything else in it stays as it is."""
    return [item.item() if isinstance(item, np.integer) else item for item in token_ids]
