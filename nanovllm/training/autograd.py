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

from nanovllm.training.operations import Array, AttentionShape, NumpyOperations, TokenIds


class Tensor:
    """An array of the forward pass, and the gradient of the loss with respect to it.

    Attributes:
        data: the array.
        grad: the gradient, of the same shape; None until an operation has added to it. A parameter
            has an array from the start, to which every backward pass adds.
    """

    __slots__ = ("data", "grad")

    def __init__(self, data: Array, grad: Array | None = None) -> None:
        """Take an array, and for a parameter the array of its gradient."""
        self.data = data
        self.grad = grad

    def add_gradient(self, gradient: Array) -> None:
        """Add to the gradient; the first array given becomes the gradient."""
        if self.grad is None:
            self.grad = gradient
        else:
            self.grad += gradient

    def take_gradient(self) -> Array:
        """Return the gradient, which is complete, and release it."""
        gradient, self.grad = self.grad, None
        assert gradient is not None, "an output that the loss does not depend on"
        return gradient


class Tape:
    """Records operations, and runs their backward passes in reverse.

    Each method is an operation of operations.py on tensors. The memory of an operation's arrays is
    released as soon as its backward pass has run.
    """

    def __init__(self, operations: NumpyOperations, *, records: bool = True) -> None:
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
        out = Tensor(
            self._operations.embed(token_ids, token_embedding.data, position_embedding.data)
        )

        def backward() -> None:
            self._operations.embed_backward(
                out.take_gradient(),
                token_ids,
                _gradient_of(token_embedding),
                position_embedding.grad,
            )

        self._record(backward)
        return out

    def layer_norm(self, x: Tensor, gain: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Return the layer normalization of each row."""
        data, mean, inverse = self._operations.layer_norm(x.data, gain.data, bias.data, epsilon)
        out = Tensor(data)

        def backward() -> None:
            x.grad = self._operations.layer_norm_backward(
                out.take_gradient(),
                x.data,
                gain.data,
                mean,
                inverse,
                _gradient_of(gain),
                _gradient_of(bias),
                x.grad,
            )

        self._record(backward)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str = "linear") -> Tensor:
        """Return activation(x @ weight + bias)."""
        data, activation_input = self._operations.linear(x.data, weight.data, bias.data, activation)
        out = Tensor(data)

        def backward() -> None:
            gradient = self._operations.linear_backward(
                out.take_gradient(),
                x.data,
                weight.data,
                activation,
                activation_input,
                _gradient_of(weight),
                _gradient_of(bias),
            )
            x.add_gradient(gradient)

        self._record(backward)
        return out

    def attention(self, qkv: Tensor, shape: AttentionShape) -> Tensor:
        """Return causal self-attention."""
        data, logsumexp = self._operations.attention(qkv.data, shape)
        out = Tensor(data)

        def backward() -> None:
            qkv.add_gradient(
                self._operations.attention_backward(
                    out.take_gradient(), qkv.data, data, logsumexp, shape
                )
            )

        self._record(backward)
        return out

    def dropout(self, x: Tensor, rate: float, key: int) -> Tensor:
        """Return x with a part of its elements set to 0."""
        out = Tensor(self._operations.dropout(x.data, rate, key))
        self._record(
            lambda: x.add_gradient(self._operations.dropout(out.take_gradient(), rate, key))
        )
        return out

    def add_dropout(self, residual: Tensor, x: Tensor, rate: float, key: int) -> Tensor:
        """Return residual + dropout(x).

        The gradient of the sum is passed on as the gradient of the residual, in the same memory:
        one array carries the gradient of the residual stream through the whole backward pass.
        """
        out = Tensor(self._operations.add_dropout(residual.data, x.data, rate, key))

        def backward() -> None:
            gradient = out.take_gradient()
            # Without dropout this is the residual's array too. What reads it, the branch's last
            # linear layer, runs its backward pass before anything is added to the residual's.
            x.add_gradient(self._operations.dropout(gradient, rate, key))
            residual.add_gradient(gradient)

        self._record(backward)
        return out

    def cross_entropy(
        self, hidden: Tensor, head: Tensor, targets: np.ndarray, scale: float
    ) -> float:
        """Return the sum of the losses of all rows; the gradient is that of `scale` * sum."""
        if not self._records:
            return self._operations.cross_entropy(hidden.data, head.data, targets)
        total, gradient = self._operations.cross_entropy_backward(
            hidden.data, head.data, targets, scale, _gradient_of(head)
        )
        hidden.add_gradient(gradient)
        return total


def _gradient_of(parameter: Tensor) -> Array:
    assert parameter.grad is not None, "a parameter has a gradient from the start"
    return parameter.grad
