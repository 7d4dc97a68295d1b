"""The compiled entry points of inference, the functions that Python calls."""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.forward import make_forward
from nanovllm.model.kernels.forward.head import make_greedy, make_logits
from nanovllm.model.kernels.forward.prepare import prepare_attention
from nanovllm.model.kernels.forward.steps import make_greedy_steps
from nanovllm.model.kernels.sampling.sample import make_sample_rows
from nanovllm.model.kernels.simd.memory import step_record_at
from nanovllm.model.kernels.threads.worker import POOL_FUNCTIONS


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.ENTRIES, not yet compiled."""
    return {
        "prepare_attention": prepare_attention,
        "forward": _from_the_first_phase(make_forward(spec)),
        "logits": make_logits(spec),
        "greedy": _from_the_first_phase(make_greedy(spec)),
        "greedy_steps": make_greedy_steps(spec),
        "sample_rows": make_sample_rows(spec.target),
        **POOL_FUNCTIONS,
    }


def _from_the_first_phase(function: Any) -> Any:
    """Return function(record_ptr, thread) for one that takes a phase too."""

    @compiled
    def entry(record_ptr: int, thread: int) -> None:
        function(record_ptr, thread, step_record_at(record_ptr).phases_ptr)

    return entry
