"""The compiled entry points of training, the functions that Python calls."""

from typing import Any

from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.threads.worker import POOL_FUNCTIONS
from nanovllm.training.kernels.cross_entropy import make_cross_entropy, make_pack_head
from nanovllm.training.kernels.linear import make_linear, make_linear_backward
from nanovllm.training.kernels.optimizer import make_adamw, make_sum_of_squares


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.TRAINING, not yet compiled."""
    target = spec.target
    return {
        "adamw": make_adamw(target),
        "sum_of_squares": make_sum_of_squares(target),
        "linear": make_linear(target),
        "linear_backward": make_linear_backward(target),
        "pack_head": make_pack_head(target),
        "cross_entropy": make_cross_entropy(target),
        **POOL_FUNCTIONS,
    }
