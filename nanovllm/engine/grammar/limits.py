"""Resource limits of grammars, and the errors of grammars that cannot be used."""

from dataclasses import dataclass

from nanovllm.errors import EngineNotReadyError, InvalidRequestError, printable, setting

PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Resource limits of grammars.

    Attributes:
        num_workers: maximum number of worker processes. All but one compile new grammars.
        memory_bytes: memory that compiling one grammar may add to a process.
        compile_cpu_s, mask_cpu_s: processor time for compiling one grammar, and for one mask.
        compile_wall_s, mask_wall_s: elapsed time for the same; also ends a worker that hangs.
        request_cpu_s, request_cpu_s_per_mask: processor time for all masks of a sequence:
            request_cpu_s + request_cpu_s_per_mask * number of masks.
        max_waiting, max_wait_s: maximum length of the compile queue, and time in it.
        max_grammars, max_bytes: maximum number of compiled grammars in all workers, and their
            total memory.
    """

    num_workers: int = 3

    memory_bytes: int = 256 << 20
    compile_cpu_s: float = 5.0
    compile_wall_s: float = 30.0
    mask_cpu_s: float = 1.0
    mask_wall_s: float = 20.0
    request_cpu_s: float = 10.0
    request_cpu_s_per_mask: float = 0.005
    max_waiting: int = 64
    max_wait_s: float = 30.0
    max_grammars: int = 64
    max_bytes: int = 1 << 30

    @property
    def max_compiling(self) -> int:
        """Maximum number of new grammars that are compiled concurrently."""
        return max(1, self.num_workers - 1)

    def allow(self, num_grammars: int, num_bytes: int) -> bool:
        """Return whether so many grammars may use so much memory; one alone may use any amount."""
        is_small = num_bytes <= self.max_bytes or num_grammars == 1
        return num_grammars <= self.max_grammars and is_small

    def sequence_cpu_s(self, num_masks: int) -> float:
        """Return the maximum processor time of so many masks of a sequence."""
        return self.request_cpu_s + self.request_cpu_s_per_mask * num_masks


def limit_error(limit: str, limits: GrammarLimits) -> InvalidRequestError:
    """Return the error of a grammar for which a worker reached a limit."""
    reasons = {
        "memory": f"the grammar needs more than {limits.memory_bytes >> 20} MiB of memory",
        "stack": "the rules of the grammar are nested too deeply",
        "time": (
            f"the grammar takes more than {limits.compile_cpu_s:g} s to compile "
            f"or {limits.mask_cpu_s:g} s for one token"
        ),
        "total": "the grammar takes too long over all tokens of the output",
    }
    return not_usable(f"{reasons[limit]}; make it simpler or smaller")


def stopped_error() -> EngineNotReadyError:
    """Return the error of a grammar that is used after the engine has stopped."""
    return EngineNotReadyError("the engine was stopped")


def unknown_tokenizer(message: str) -> InvalidRequestError:
    """Return the error of a tokenizer that the grammar library does not support."""
    return InvalidRequestError(
        f"{setting(PARAM)} cannot be used with this tokenizer: {_one_line(message)}",
        param=PARAM,
    )


def not_usable(reason: str) -> InvalidRequestError:
    """Return the error of a grammar that cannot be used."""
    return InvalidRequestError(f"{setting(PARAM)} cannot be used: {_one_line(reason)}", param=PARAM)


def _one_line(text: str) -> str:
    """Return a message of the library on one line, cut at 300 characters."""
    return printable(" ".join(text.split()), 300)
