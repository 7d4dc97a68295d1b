"""The exceptions people meet, as a tree.

NanovllmError
├── InvalidRequestError (also a ValueError)   one request is wrong: names the value, the limit and the remedy
│   └── ContextLengthError                    prompt and max_tokens do not fit the model or the cache
├── CheckpointError (also a ValueError)       a model folder cannot be used: lists everything that is wrong with it
├── ModelNotFoundError                        a model name leads to no folder, here or on the hub
└── EngineError                               the engine cannot answer
    ├── EngineNotReadyError                   still loading, or already stopped
    ├── QueueFullError                        too many requests wait: try again later
    ├── RequestTimeoutError                   the time that the request was given is over
    └── EngineFaultError                      a step failed while this request was in it
"""

from typing_extensions import Self


class NanovllmError(Exception):
    """Base of every exception that nanovllm raises on purpose."""


class InvalidRequestError(NanovllmError, ValueError):
    """A request that can never be answered as it stands; `param` names the field at fault, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def at(self, prefix: str, *, param: str | None = None) -> Self:
        """Return this error with a prefix, such as "prompt 3", and another `param` if given."""
        return type(self)(f"{prefix}: {self}", param=param or self.param)


class ContextLengthError(InvalidRequestError):
    """Prompt and max_tokens together do not fit the model's context or the KV cache."""


class CheckpointError(NanovllmError, ValueError):
    """A model folder that cannot be loaded; the message lists every problem found."""


class ModelNotFoundError(NanovllmError):
    """A model name that leads to no folder, neither on this machine nor on the hub."""


class EngineError(NanovllmError):
    """The engine cannot answer this request."""


class EngineNotReadyError(EngineError):
    """The engine is still loading its model, or has been stopped."""


class QueueFullError(EngineError):
    """So many requests wait already that one more is refused; `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(EngineError):
    """The time that the request was given is over, and what there was of its answer is dropped.

    `has_begun` says whether the engine had worked on it; where not, `retry_after_s` says when its turn might come sooner.
    """

    def __init__(self, message: str, *, has_begun: bool, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.has_begun = has_begun
        self.retry_after_s = retry_after_s


class EngineFaultError(EngineError):
    """A step of the engine failed while this request took part in it."""


def printable(text: str, limit: int = 200) -> str:
    """Return text of unknown origin for a message: control characters escaped, cut at `limit`.

    An escape sequence in a model's name or in a header must not reach a terminal or forge a line of
    a log. The result has at most `limit` characters, plus "..." where something was cut.
    """
    escaped = "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "backslashreplace").decode("ascii")
        for character in text[: limit + 1]
    )
    return escaped if len(escaped) <= limit else f"{escaped[:limit]}..."


def describe_value(value: object) -> str:
    """Return an invalid value for a message: its repr where that is short, otherwise its type."""
    text = repr(value) if isinstance(value, str | int | float | None) else ""
    return text if 0 < len(text) <= 40 else f"a {type(value).__name__}"
