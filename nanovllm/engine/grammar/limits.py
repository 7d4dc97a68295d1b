"""Limits of grammars, and the errors of grammars that reach one or cannot be used."""

from dataclasses import dataclass

from nanovllm.errors import InvalidRequestError

PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Resources that grammars may use.

    Attributes:
        memory_bytes: memory that compiling a grammar may add to a process.
        compile_cpu_s, mask_cpu_s: processor time for compiling a grammar, and for one mask.
        compile_wall_s, mask_wall_s: elapsed time for the same, which also ends a worker that hangs.
        request_cpu_s, request_cpu_s_per_mask: processor time for all masks of a sequence: the
            first, plus the second for each mask.
        max_compiling: maximum number of grammars that are compiled at once.
        max_waiting, max_wait_s: maximum number of grammars that wait for that, and how long.
        max_workers, max_bytes: maximum number of worker processes, and of their memory in total.
    """

    memory_bytes: int = 256 << 20
    compile_cpu_s: float = 5.0
    compile_wall_s: float = 30.0
    mask_cpu_s: float = 1.0
    mask_wall_s: float = 20.0
    request_cpu_s: float = 10.0
    request_cpu_s_per_mask: float = 0.005
    max_compiling: int = 2
    max_waiting: int = 64
    max_wait_s: float = 30.0
    max_workers: int = 64
    max_bytes: int = 1 << 30


def describe_limit(limit: str, limits: GrammarLimits) -> str:
    """Return why a grammar's worker was ended: the limit that it reached, and the remedy."""
    reasons = {
        "memory": f"the grammar needs more than {limits.memory_bytes >> 20} MiB of memory",
        "stack": "the rules of the grammar are nested too deeply",
        "time": (
            f"the grammar takes more than {limits.compile_cpu_s:g} s to compile "
            f"or {limits.mask_cpu_s:g} s for one token"
        ),
        "total": "the grammar takes too long over all tokens of the answer",
    }
    return f"{reasons[limit]}; make it simpler or smaller"


def unknown_tokenizer(message: str) -> InvalidRequestError:
    """Return the error for a tokenizer that the grammar library does not know."""
    return InvalidRequestError(
        f"structured_outputs cannot be used with this tokenizer: {_shorten(message)}",
        param=PARAM,
    )


def not_usable(reason: str) -> InvalidRequestError:
    """Return the error of a grammar that cannot be used for this reason."""
    return InvalidRequestError(
        f"structured_outputs cannot be used: {_shorten(reason)}", param=PARAM
    )


def _shorten(text: str, limit: int = 300) -> str:
    """Return the beginning of a message of the library, on one line."""
    shown = " ".join(text.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
