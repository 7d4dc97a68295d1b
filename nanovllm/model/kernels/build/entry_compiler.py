"""Compilation of all entries of a library, with a progress bar."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numba.core import event

from nanovllm.model.kernels.build.codegen import LLVMCpu
from nanovllm.model.kernels.build.compiler import ARGUMENTS, emit_object
from nanovllm.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm


def compile_entries(entries: Mapping[str, Any], cpu: LLVMCpu) -> bytes:
    """Compile functions, by name, to an object file."""
    line = progress_bar(
        total=len(entries),
        bar_format="Compiling kernels for this CPU (once): "
        "{desc}{n}/{total} done{postfix} [{elapsed}]",
    )
    with line, event.install_listener("numba:compile", _Tell(line)):
        for name, function in entries.items():
            line.set_description(name)
            function.compile(ARGUMENTS)
            line.update()
        line.set_description("machine code")
        return emit_object(entries, cpu)


class _Tell(event.Listener):
    """Shows the function that Numba compiles, and how many it has compiled."""

    def __init__(self, line: "tqdm[Any]") -> None:
        self._line = line
        self._done = 0

    def on_start(self, event: Any) -> None:
        self._line.set_postfix_str(
            f"{self._done} functions, now {event.data['dispatcher'].py_func.__name__}"
        )

    def on_end(self, event: Any) -> None:
        self._done += 1
