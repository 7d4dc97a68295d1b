"""Attention on compiled kernels: a part of CompiledOperations."""

from collections.abc import Callable

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.training.kernels.attention.layout import (
    attention_backward_layout,
    attention_layout,
    panel_width,
)
from nanovllm.training.kernels.runner import OperationRunner
from nanovllm.training.network.dropout import threshold
from nanovllm.training.network.operations import Array, AttentionShape, NumpyOperations, Rows


class AttentionOperations(NumpyOperations):
    """NumpyOperations whose attention is compiled."""

    def __init__(self, runner: OperationRunner) -> None:
        """Compute with `runner`."""
        self._runner = runner
        self._empty = runner.arrays.empty
        self._work = runner.work

    def attention(self, qkv: Rows, shape: AttentionShape) -> tuple[Rows, Array]:
        """Return causal self-attention, and the logsumexp of each row of scores."""
        out = self._empty(len(qkv), qkv.shape[1] // 3)
        logsumexp = self._empty(shape.batch, shape.heads, shape.context)
        self._run_attention(
            "attention", shape, attention_layout, qkv=qkv, out=out, logsumexp=logsumexp
        )
        return out, logsumexp

    def attention_backward(
        self, grad_out: Rows, qkv: Rows, out: Rows, logsumexp: Array, shape: AttentionShape
    ) -> Rows:
        """Return grad_qkv."""
        grad_qkv = self._empty(*qkv.shape)
        self._run_attention(
            "attention_backward",
            shape,
            attention_backward_layout,
            grad_out=grad_out,
            qkv=qkv,
            out=out,
            logsumexp=logsumexp,
            grad_qkv=grad_qkv,
        )
        return grad_qkv

    def _run_attention(
        self,
        name: str,
        shape: AttentionShape,
        layout: Callable[..., tuple[int, ...]],
        **arrays: Array,
    ) -> None:
        """Run an entry of attention with working memory for each thread."""
        d_model = arrays["out"].shape[1]
        head_dim = d_model // shape.heads
        self._work.clear()
        *_, scratch_bytes = layout(shape.context, head_dim, panel_width(self._runner.target))
        self._runner.run(
            name,
            4 * shape.context * arrays["out"].size,
            batch=shape.batch,
            context=shape.context,
            heads=shape.heads,
            head_dim=head_dim,
            scale=shape.scale,
            scratch=self._work.take(self._runner.threads * scratch_bytes // WORD_BYTES),
            scratch_bytes=scratch_bytes,
            **dropout_arguments(shape.dropout, shape.key),
            **arrays,
        )


def dropout_arguments(rate: float, key: int) -> dict[str, float]:
    """Return the arguments of a use of dropout."""
    return {
        "key_low": key & 0xFFFFFFFF,
        "key_high": key >> 32,
        "threshold": threshold(rate),
        "factor": 1.0 / (1.0 - rate),
    }
