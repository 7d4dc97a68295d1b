"""Resource limits of grammars, and the errors of grammars that cannot be used."""

from dataclasses import dataclass

from nanovllm.errors import InvalidRequestError

PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Resource limits of grammars.

    Attributes:
        memory_bytes: memory that compiling one grammar may add to a process.
        compile_cpu_s, mask_cpu_s: processor time for compiling one grammar, and for one mask.
        compile_wall_s, mask_wall_s: elapsed time for the same; also ends a worker that hangs.
        request_cpu_s, request_cpu_s_per_mask: processor time for all masks of a sequence:
            request_cpu_s + request_cpu_s_per_mask * number of masks.
        max_compiling: maximum number of grammars compiled concurrently.
        max_waiting, max_wait_s: maximum length of the compile queue, and time in it.
        max_workers, max_bytes: maximum number of worker processes, and their total memory.
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

    def allow(self, num_workers: int, num_bytes: int) -> bool:
        """Return whether so many workers may use so much memory; one alone may use any amount."""
        is_small = num_bytes <= self.max_bytes or num_workers == 1
        return num_workers <= self.max_workers and is_small


def describe_limit(limit: str, limits: GrammarLimits) -> str:
    """Return the message for a worker that reached a limit."""
    reasons = {
        "memory": f"the grammar needs more than {limits.memory_bytes >> 20} MiB of memory",
        "stack": "the rules of the grammar are nested too deeply",
        "time": (
            f"the grammar takes more than {limits.compile_cpu_s:g} s to compile "
            f"or {limits.mask_cpu_s:g} s for one token"
        ),
        "total": "the grammar takes too long over all tokens of the output",
    }
    return f"{reasons[limit]}; make it simpler or smaller"


def unknown_tokenizer(message: str) -> InvalidRequestError:
    """Return the error of a tokenizer that the grammar library does not support."""
    return InvalidRequestError(
        f"structured_outputs cannot be used with this tokenizer: {_shorten(message)}",
        param=PARAM,
    )


def not_usable(reason: str) -> InvalidRequestError:
    """Return the error of a grammar that cannot be used."""
    return InvalidRequestError(
        f"structured_outputs cannot be used: {_shorten(reason)}", param=PARAM
    )


def _shorten(text: str, limit: int = 300) -> str:
    """Return a message of the library on one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
