"""All that Python calls, compiled together."""

from typing import Any

from numba.core import event
from tqdm import tqdm

from nanovllm.model.kernels import helpers
from nanovllm.model.kernels.compiler import ARGUMENTS, emit_object
from nanovllm.model.kernels.forward import make_forward, make_greedy, make_logits
from nanovllm.model.kernels.processor import Processor
from nanovllm.model.kernels.sampling import make_sample_rows
from nanovllm.model.kernels.target import Spec


def make_entries(spec: Spec) -> dict[str, Any]:
    """The functions of library.ENTRIES, not yet compiled."""
    return {
        "forward": make_forward(spec),
        "logits": make_logits(spec),
        "greedy": make_greedy(spec),
        "sample_rows": make_sample_rows(spec.target),
        "prepare_job": helpers.prepare_job,
        "run_job": helpers.run_job,
        "help_job": helpers.help_job,
        "wake_helpers": helpers.wake_helpers,
    }


def compile_entries(spec: Spec, processor: Processor) -> bytes:
    """The object file of all entries; on a terminal, a line says what is being compiled and how far it is."""
    entries = make_entries(spec)
    line = tqdm(total=len(entries), desc="Compiling kernels for this CPU, once", bar_format="{desc}: {n}/{total} {postfix} [{elapsed}]", disable=None)
    with line, event.install_listener("numba:compile", _Tell(line)):
        for function in entries.values():
            function.compile(ARGUMENTS)
            line.update()
        line.set_postfix_str("machine code")
        return emit_object(entries, processor)


class _Tell(event.Listener):
    """Shows which function Numba begins or goes on with."""

    def __init__(self, line: "tqdm[Any]") -> None:
        self._line = line
        self._names: list[str] = []

    def on_start(self, event: Any) -> None:
        self._names.append(event.data["dispatcher"].py_func.__name__)
        self._line.set_postfix_str(self._names[-1])

    def on_end(self, event: Any) -> None:
        self._names.pop()
