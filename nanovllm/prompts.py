"""Types of prompts in Python, named as in vLLM."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from nanovllm.errors import InvalidRequestError


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


TokenIds: TypeAlias = Sequence[int] | Sequence[np.integer[Any]] | npt.NDArray[np.integer[Any]]


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: TokenIds


Prompt: TypeAlias = str | TokenIds | TextPrompt | TokensPrompt | Mapping[str, object]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return one prompt, or an iterable of prompts, as a list of prompts.

    Integers are the token ids of one prompt. A two-dimensional NumPy array has one prompt per row.

    Raises InvalidRequestError for anything else than a prompt or an ordered iterable.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    values: Any = to_list(prompts)
    unordered = (bytes, bytearray, memoryview, set, frozenset)
    if isinstance(values, unordered) or not isinstance(values, Iterable):
        raise InvalidRequestError(
            f"prompts is a {type(prompts).__name__} but must be a prompt or a list of prompts",
            param="prompt",
        )
    listed = list(values)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]
    return listed


def to_list(values: object) -> Any:
    """Return an array that has `tolist` as nested lists, anything else unchanged."""
    convert = getattr(values, "tolist", None)
    return convert() if callable(convert) and not isinstance(values, memoryview) else values


def to_python_ids(token_ids: Sequence[Any]) -> list[Any]:
    """Return a list with NumPy integers converted to Python's; other items are unchanged."""
    return [item.item() if isinstance(item, np.integer) else item for item in token_ids]
