"""The operations of training: what a forward pass, its backward pass and an update consist of.

If L is the loss, the gradient of an array x is dL/dx, written grad_x, and has the shape of x. The
backward pass of y = f(x) computes grad_x from grad_y by the chain rule, without the Jacobian of f.
numpy_operations.py has the formulas and is the specification; nanovllm/training/kernels computes
the same, compiled.

Rows are tokens: of a batch of sequences with `context` tokens each, row b * context + t is token t
of sequence b. A linear layer's weight is [d_in, d_out], as in GPT-2's checkpoints. Gradients of
parameters are added to their arrays, because a parameter may be used twice, as in a tied head, and
because a step may accumulate several batches. All arrays have one float type: float32, or float64
to check gradients.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from nanovllm.training.network.dropout import Key

Array = Float[np.ndarray, "..."]
Rows = Float[np.ndarray, "tokens d_model"]
Inputs = Float[np.ndarray, "tokens d_in"]
Outputs = Float[np.ndarray, "tokens d_out"]
Weight = Float[np.ndarray, "d_in d_out"]
Bias = Float[np.ndarray, " d_out"]
QKV = Float[np.ndarray, "tokens d_qkv"]
PerChannel = Float[np.ndarray, " d_model"]
PerToken = Float[np.ndarray, " tokens"]
TokenTable = Float[np.ndarray, "vocab d_model"]
PositionTable = Float[np.ndarray, "positions d_model"]
LogSumExp = Float[np.ndarray, "batch heads context"]
Targets = Int64[np.ndarray, " tokens"]
TokenIds = Int64[np.ndarray, "batch context"]

IGNORED = -1
"""As a target: the row has no loss and no gradient."""
Pass = Callable[..., float]
"""Takes arrays of integers, such as token ids, returns their loss, and may add its gradients."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes and options of one self-attention.

    Attributes:
        scale: factor of the scores, usually 1 / sqrt(head_dim).
        is_causal: a token attends to itself and earlier ones, not to all of its sequence.
        dropout: rate of dropout on the attention weights.
        key: key of that dropout (dropout.py); None without dropout.
    """

    batch: int
    context: int
    heads: int
    scale: float
    dropout: float = 0.0
    key: Key | None = None
    is_causal: bool = True


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """The numbers of one AdamW update.

    Attributes:
        step: number of the update, from 1.
        gradient_scale: factor of the gradients, from clipping.
    """

    step: int
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    gradient_scale: float


@runtime_checkable
class Operations(Protocol):
    """The operations, for one caller at a time."""

    def close(self) -> None:
        """Release what the operations hold, such as threads."""

    def run_pass(self, key: Hashable, compute: Pass, *inputs: np.ndarray) -> float:
        """Return compute(*inputs), whose only effects are those of operations.

        Equal keys mean that `compute` calls the same operations on the same arrays, apart from the
        contents of `inputs`. So an implementation may plan them once for each shape of the inputs.
        """

    def embed(
        self, token_ids: TokenIds, token_embedding: TokenTable, position_embedding: PositionTable
    ) -> Rows:
        """Return token_embedding[token] + position_embedding[position] of each token."""

    def embed_backward(
        self,
        grad_out: Rows,
        token_ids: TokenIds,
        grad_token_embedding: TokenTable,
        grad_position_embedding: PositionTable | None,
    ) -> None:
        """Add each row's gradient to its token's embedding, and to its position's if learned."""

    def layer_norm(
        self, x: Rows, gain: PerChannel, bias: PerChannel, epsilon: float
    ) -> tuple[Rows, PerToken, PerToken]:
        """Return gain * n + bias with n = (x - mean) * inverse, and each row's mean and inverse."""

    def layer_norm_backward(
        self,
        grad_out: Rows,
        x: Rows,
        gain: PerChannel,
        mean: PerToken,
        inverse: PerToken,
        grad_gain: PerChannel,
        grad_bias: PerChannel,
        onto: Rows | None,
    ) -> Rows:
        """Return grad_x, added to `onto` if given, whose memory it may take."""

    def linear(
        self,
        x: Inputs,
        weight: Weight,
        bias: Bias,
        activation: str,
        residual: Outputs | None = None,
        *,
        needs_slope: bool = True,
    ) -> tuple[Outputs, Outputs | None]:
        """Return f(z) with z = x @ weight + bias, and f'(z), or None where f is the identity.

        There alone, a `residual` may be given, and is added to z. A forward pass without a backward
        pass needs no slope f'(z), and gets None.
        """

    def linear_backward(
        self,
        grad_out: Outputs,
        x: Inputs,
        weight: Weight,
        slope: Outputs | None,
        grad_weight: Weight,
        grad_bias: Bias,
    ) -> Inputs:
        """Return grad_x; may overwrite grad_out where there is a slope f'(z)."""

    def attention(self, qkv: QKV, shape: AttentionShape) -> tuple[Rows, LogSumExp]:
        """Return causal self-attention, and the logsumexp of each row of scores.

        qkv is [tokens, 3 * d_model]: queries, keys, values, each with the heads side by side.
        """

    def attention_backward(
        self, grad_out: Rows, qkv: QKV, out: Rows, logsumexp: LogSumExp, shape: AttentionShape
    ) -> QKV:
        """Return grad_qkv."""

    def dropout(self, x: Rows, rate: float, key: Key, residual: Rows | None = None) -> Rows:
        """Return x with elements set to 0 at `rate`, the others divided by 1 - rate.

        A residual is added to that: the end of a residual branch.
        """

    def cross_entropy(
        self,
        hidden: Rows,
        head: TokenTable,
        targets: Targets,
        scale: float = 0.0,
        grad_head: TokenTable | None = None,
    ) -> tuple[float, Rows | None]:
        """Return the sum over rows of -log softmax(hidden @ head^T)[target], and grad_hidden.

        A row whose target is IGNORED adds nothing to the sum and to the gradients.
        The gradients are those of `scale` times the sum; without `grad_head` there are none.
        """

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of the squares of all elements, in float64."""

    def adamw(
        self,
        parameters: Array,
        gradients: Array,
        first_moment: Array,
        second_moment: Array,
        settings: AdamWStep,
    ) -> None:
        """Update parameters and moments in place, and set the gradients to 0."""


def check_residual(activation: str, residual: Outputs | None) -> None:
    """Assert that a residual is added to the result of a linear layer without an activation."""
    assert residual is None or activation == "linear", (
        f"linear adds a residual to no activation, not to {activation}"
    )
