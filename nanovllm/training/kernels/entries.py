"""The compiled entry points of training, the functions that Python calls."""

from typing import Any

from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.threads.worker import POOL_FUNCTIONS
from nanovllm.training.kernels.attention.backward import make_attention_backward
from nanovllm.training.kernels.attention.forward import make_attention
from nanovllm.training.kernels.cross_entropy import make_cross_entropy, make_pack_head
from nanovllm.training.kernels.dropout import make_dropout
from nanovllm.training.kernels.embedding import make_embed, make_embed_backward
from nanovllm.training.kernels.layer_norm import make_layer_norm, make_layer_norm_backward
from nanovllm.training.kernels.linear import make_linear, make_linear_backward
from nanovllm.training.kernels.optimizer import make_adamw, make_sum_of_squares
from nanovllm.training.kernels.phases import make_run_calls
from nanovllm.training.kernels.records import RUN_CALLS


def make_entries(spec: Spec) -> dict[str, Any]:
    """Return the functions of library.TRAINING, not yet compiled."""
    target = spec.target
    operations = {
        "adamw": make_adamw(target),
        "sum_of_squares": make_sum_of_squares(target),
        "dropout": make_dropout(target),
        "attention": make_attention(target),
        "attention_backward": make_attention_backward(target),
        "layer_norm": make_layer_norm(target),
        "layer_norm_backward": make_layer_norm_backward(target),
        "embed": make_embed(target),
        "embed_backward": make_embed_backward(target),
        "linear": make_linear(target),
        "linear_backward": make_linear_backward(target),
        "pack_head": make_pack_head(target),
        "cross_entropy": make_cross_entropy(target),
    }
    return {RUN_CALLS: make_run_calls(operations), **POOL_FUNCTIONS}
