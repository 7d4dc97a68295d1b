"""The compiled entry points, the functions that Python calls."""

from typing import TYPE_CHECKING, Any

from numba.core import event

from nanovllm.model.kernels.build.codegen import LLVMCpu
from nanovllm.model.kernels.build.compiler import ARGUMENTS, emit_object
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.forward import make_forward
from nanovllm.model.kernels.forward.head import make_greedy, make_logits
from nanovllm.model.kernels.forward.prepare import prepare_attention
from nanovllm.model.kernels.sampling.sample import make_sample_rows
from nanovllm.model.kernels.threads import worker
from nanovllm.model.kernels.threads.barrier import spin
from nanovllm.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.ENTRIES, not yet compiled."""
    return {
        "prepare_attention": prepare_attention,
        "forward": make_forward(spec),
        "logits": make_logits(spec),
        "greedy": make_greedy(spec),
        "sample_rows": make_sample_rows(spec.target),
        "prepare_job": worker.prepare_job,
        "run_job": worker.run_job,
        "help_job": worker.help_job,
        "wake_helpers": worker.wake_helpers,
        "spin": spin,
    }


def compile_entries(spec: Spec, cpu: LLVMCpu) -> bytes:
    """Compile all entries to an object file, with a progress bar."""
    entries = make_entries(spec)
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
