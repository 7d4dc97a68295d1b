"""The public exceptions.

NanovllmError
├── InvalidRequestError (ValueError)   a request is invalid: names the value, limit and remedy
│   └── ContextLengthError             prompt and max_tokens exceed the context or the KV cache
├── CheckpointError (ValueError)       a model folder cannot be loaded: lists all of its problems
├── ModelNotFoundError                 a model is neither on this machine nor on the hub
├── TrainingError (ValueError)         training cannot begin or go on: names the value and remedy
└── EngineError                        the engine cannot process the request
    ├── EngineNotReadyError            the engine is loading or has stopped
    ├── QueueFullError                 too many requests wait; try again later
    ├── RequestTimeoutError            the request exceeded its deadline
    └── EngineFaultError               a step with this request failed
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

from typing_extensions import Self

MAX_LISTED = 10
"""Invalid values that a message lists."""
_SETTING = re.compile("\0([a-z_.]+)\0")


class NanovllmError(Exception):
    """Base class of all exceptions that nanovllm raises on purpose."""


def setting(name: str) -> str:
    """Return the name of a setting for the message of an InvalidRequestError.

    Each interface may have a name of its own for it, see `InvalidRequestError.named`.
    """
    return f"\0{name}\0"


class InvalidRequestError(NanovllmError, ValueError):
    """A request is invalid.

    Attributes:
        param: the setting at fault; None where there is none.
        remedy: what to do about it; empty where the message tells. It is the end of the error's
            text.
    """

    def __init__(self, message: str, *, param: str | None = None, remedy: str = "") -> None:
        self._message = message
        self.remedy = remedy
        self.param = param
        super().__init__(self._text({}))

    def at(self, prefix: str, *, param: str | None = None) -> Self:
        """Return this error with a prefix, such as "prompt 3", and another `param` if given."""
        message = f"{prefix}: {self._message}"
        return type(self)(message, param=param or self.param, remedy=self.remedy)

    def named(self, names: Mapping[str, str]) -> Self:
        """Return this error with an interface's names of settings in place of ours."""
        param = None if self.param is None else names.get(self.param, self.param)
        return type(self)(self._text(names), param=param)

    def _text(self, names: Mapping[str, str]) -> str:
        text = "; ".join(filter(None, (self._message, self.remedy)))
        return _SETTING.sub(lambda match: names.get(match[1], match[1]), text)


class ContextLengthError(InvalidRequestError):
    """Prompt and max_tokens together exceed the model's context or the KV cache."""


class CheckpointError(NanovllmError, ValueError):
    """A model folder cannot be loaded. The message lists all problems found."""


class KernelError(NanovllmError, RuntimeError):
    """There are no compiled kernels for this CPU, and they cannot be compiled."""


class ModelNotFoundError(NanovllmError):
    """A model is neither on this machine nor on the hub."""


@contextmanager
def about_draft_model() -> Iterator[None]:
    """Have errors of a model say that it is the draft model, not the one that is served."""
    try:
        yield
    except (CheckpointError, ModelNotFoundError) as error:
        raise type(error)(f"the draft model in speculative_config: {error}") from error


class TrainingError(NanovllmError, ValueError):
    """Training cannot begin or go on: a setting, the data or the loss is unusable."""


class EngineError(NanovllmError):
    """The engine cannot process the request."""


class EngineNotReadyError(EngineError):
    """The engine is loading its model, or has stopped."""


class QueueFullError(EngineError):
    """Too many requests wait. Retry after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(EngineError):
    """The request exceeded its deadline and was aborted.

    `has_begun` is whether the engine had started it. If not, retry after `retry_after_s` seconds.
    """

    def __init__(self, message: str, *, has_begun: bool, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.has_begun = has_begun
        self.retry_after_s = retry_after_s


class EngineFaultError(EngineError):
    """A step of the engine with this request failed."""


def printable(text: str, limit: int = 200) -> str:
    """Return untrusted text for a message: control characters escaped, cut at `limit`.

    An escape sequence in a model name or a header must not reach a terminal or forge a log line.
    The result has at most `limit` characters, plus "..." where it was cut.
    """
    escaped = "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else f"{escaped[:limit]}..."


def counted(count: int, noun: str) -> str:
    """Return a number of things for a message, such as "1 token"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def describe_value(value: object) -> str:
    """Return an invalid value for a message: its repr where that is short, otherwise its type."""
    text = repr(value) if isinstance(value, str | int | float | None) else ""
    return text if 0 < len(text) <= 40 else f"a {type(value).__name__}"


def listed(values: Iterable[str]) -> str:
    """Return invalid values for a message, with commas between, the first MAX_LISTED of them."""
    first = list(islice(values, MAX_LISTED + 1))
    return ", ".join(first[:MAX_LISTED]) + (", ..." if len(first) > MAX_LISTED else "")
