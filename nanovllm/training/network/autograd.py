"""Reverse-mode automatic differentiation over the fused operations.

A Tape computes the forward pass, and records for every operation a function that computes its
backward pass. `Tape.backward` calls these functions in reverse order. Each takes the gradient of
its operation's output and adds to the gradients of the inputs:

    forward     x --layer_norm--> n --linear--> y --cross_entropy--> loss
    backward    grad_x <--------- grad_n <---- grad_y <------------- 1

When an operation's turn comes, every operation that uses its output has already added its part to
the output's gradient, because it was recorded later. That is the whole algorithm (Linnainmaa 1970;
Baydin et al. 2018, arXiv:1502.05767, is a survey).
"""

from collections.abc import Callable

import numpy as np

from nanovllm.training.network.dropout import Key
from nanovllm.training.network.operations import (
    Array,
    AttentionShape,
    Operations,
    Targets,
    TokenIds,
)

_ANY: Key = np.zeros(1, dtype=np.uint64)


class Gradient:
    """The gradient of the loss with respect to one array of the forward pass.

    A backward pass holds the gradients of its inputs and its output. It does not hold their arrays,
    unless its formula has them: other arrays are released during the forward pass.

    Attributes:
        array: None until a backward pass has computed it. A parameter's is there from the start,
            and every backward pass adds to it.
    """

    __slots__ = ("array",)

    def __init__(self, array: Array | None = None) -> None:
        """Begin with nothing, or with the array of a parameter's gradient."""
        self.array = array

    def put(self, gradient: Array) -> None:
        """Store the gradient that the array's only use has computed.

        The residual stream alone has two uses: a layer normalization, whose backward pass adds to
        the gradient itself (or a copy in its place), and the sum that follows.
        """
        assert self.array is None, "an array that two operations use"
        self.array = gradient

    def take(self) -> Array:
        """Return the gradient, which is complete, and release it."""
        array, self.array = self.array, None
        assert array is not None, "an output that the loss does not depend on"
        return array


class Tensor:
    """An array of the forward pass, and its gradient.

    Attributes:
        data: the array.
        gradient: of the loss with respect to `data`, of the same shape.
    """

    __slots__ = ("data", "gradient")

    def __init__(self, data: Array, gradient: Array | None = None) -> None:
        """Take an array, and for a parameter the array of its gradient."""
        self.data = data
        self.gradient = Gradient(gradient)


class Tape:
    """Records operations, and runs their backward passes in reverse.

    Each method is an operation of operations.py on tensors. The memory of an operation's arrays is
    released as soon as its backward pass has run.
    """

    def __init__(self, operations: Operations, *, records: bool = True) -> None:
        """Compute with `operations`; without `records` there is no backward pass."""
        self._operations = operations
        self._records = records
        self._backward: list[Callable[[], None]] = []

    def backward(self) -> None:
        """Add the gradients of the recorded loss to all parameters."""
        while self._backward:
            self._backward.pop()()

    def _record(self, function: Callable[[], None]) -> None:
        if self._records:
            self._backward.append(function)

    def embed(
        self,
        token_ids: TokenIds,
        token_embedding: Tensor,
        position_embedding: Tensor,
    ) -> Tensor:
        """Return the sum of token and position embeddings.

        The position embedding is constant if it has no gradient.
        """
        operations = self._operations
        out = Tensor(operations.embed(token_ids, token_embedding.data, position_embedding.data))
        grad_out, grad_tokens = out.gradient, _array_of(token_embedding)
        grad_positions = position_embedding.gradient.array
        self._record(
            lambda: operations.embed_backward(
                grad_out.take(), token_ids, grad_tokens, grad_positions
            )
        )
        return out

    def layer_norm(self, x: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Return the layer normalization of each row."""
        operations, data = self._operations, x.data
        out_data, mean, inverse = operations.layer_norm(data, gain.data, bias.data, epsilon)
        out = Tensor(out_data)
        grad_x, grad_out = x.gradient, out.gradient

        def backward() -> None:
            grad_x.array = operations.layer_norm_backward(
                grad_out.take(),
                data,
                gain.data,
                mean,
                inverse,
                _array_of(gain),
                _array_of(bias),
                grad_x.array,
            )

        self._record(backward)
        return out

    def copy(self, x: Tensor) -> Tensor:
        """Return x, in place of a layer normalization: for a second use of the residual stream."""
        operations = self._operations
        out = Tensor(x.data)
        grad_x, grad_out = x.gradient, out.gradient

        def backward() -> None:
            gradient, other = grad_out.take(), grad_x.array
            # A sum: dropout at a rate of 0 keeps everything.
            added = gradient if other is None else operations.dropout(gradient, 0.0, _ANY, other)
            grad_x.array = added

        self._record(backward)
        return out

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str = "linear",
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return activation(x @ weight + bias), or residual + x @ weight + bias.

        The gradient of the sum is passed on as that of the residual; see `dropout`.
        """
        operations, data = self._operations, x.data
        added = None if residual is None else residual.data
        out_data, slope = operations.linear(
            data, weight.data, bias.data, activation, added, needs_slope=self._records
        )
        out = Tensor(out_data)
        grad_x, grad_out = x.gradient, out.gradient
        grad_residual = None if residual is None else residual.gradient

        def backward() -> None:
            gradient = grad_out.take()
            grad_x.put(
                operations.linear_backward(
                    gradient, data, weight.data, slope, _array_of(weight), _array_of(bias)
                )
            )
            if grad_residual is not None:
                grad_residual.put(gradient)

        self._record(backward)
        return out

    def attention(self, qkv: Tensor, shape: AttentionShape) -> Tensor:
        """Return causal self-attention."""
        operations, data = self._operations, qkv.data
        out_data, logsumexp = operations.attention(data, shape)
        out = Tensor(out_data)
        grad_qkv, grad_out = qkv.gradient, out.gradient
        self._record(
            lambda: grad_qkv.put(
                operations.attention_backward(grad_out.take(), data, out_data, logsumexp, shape)
            )
        )
        return out

    def dropout(self, x: Tensor, rate: float, key: Key, residual: Tensor | None = None) -> Tensor:
        """Return [residual +] x with a part of its elements set to 0.

        The gradient of the sum is passed on as the gradient of the residual, in the same memory:
        one array carries the gradient of the residual stream through the whole backward pass.
        """
        operations = self._operations
        added = None if residual is None else residual.data
        out = Tensor(operations.dropout(x.data, rate, key, added))
        grad_x, grad_out = x.gradient, out.gradient
        grad_residual = None if residual is None else residual.gradient

        def backward() -> None:
            gradient = grad_out.take()
            grad_x.put(operations.dropout(gradient, rate, key))
            if grad_residual is not None:
                grad_residual.put(gradient)

        self._record(backward)
        return out

    def cross_entropy(self, hidden: Tensor, head: Tensor, targets: Targets, scale: float) -> float:
        """Return the sum of the losses of all rows; the gradient is that of `scale` * sum."""
        grad_head = _array_of(head) if self._records else None
        total, gradient = self._operations.cross_entropy(
            hidden.data, head.data, targets, scale, grad_head
        )
        if gradient is not None:
            hidden.gradient.put(gradient)
        return total


def _array_of(parameter: Tensor) -> Array:
    """Return the array of a parameter's gradient."""
    array = parameter.gradient.array
    assert array is not None, "a parameter has a gradient from the start"
    return array
