"""The compiled entry points of training, the functions that Python calls."""

from typing import Any

from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.threads.worker import POOL_FUNCTIONS
from nanovllm.training.kernels.attention import make_attention
from nanovllm.training.kernels.dropout import make_add_dropout
from nanovllm.training.kernels.optimizer import make_adamw, make_sum_of_squares


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.TRAINING, not yet compiled."""
    target = spec.target
    return {
        "adamw": make_adamw(target),
        "sum_of_squares": make_sum_of_squares(target),
        "add_dropout": make_add_dropout(target),
        "attention": make_attention(target),
        **POOL_FUNCTIONS,
    }
