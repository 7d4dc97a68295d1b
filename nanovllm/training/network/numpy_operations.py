"""The operations of training in NumPy and, beside each, its backward pass by hand.

The formulas are in the docstrings. This file is the specification: it computes with float32 as well
as with float64, and central differences check every gradient.
"""

from collections.abc import Hashable

import numpy as np
from jaxtyping import Float

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.training.network.dropout import Key, keep_mask
from nanovllm.training.network.operations import (
    IGNORED,
    QKV,
    AdamWStep,
    Array,
    AttentionShape,
    Bias,
    Inputs,
    LogSumExp,
    Outputs,
    Pass,
    PerChannel,
    PerToken,
    PositionTable,
    Rows,
    Targets,
    TokenIds,
    TokenTable,
    Weight,
    check_residual,
)

_CHUNK_ROWS = 256  # rows of logits in memory at a time


class NumpyOperations:
    """Operations in NumPy."""

    def close(self) -> None:
        """Release nothing."""

    def run_pass(self, key: Hashable, compute: Pass, *inputs: np.ndarray) -> float:
        """Return compute(*inputs)."""
        return compute(*inputs)

    def embed(
        self, token_ids: TokenIds, token_embedding: TokenTable, position_embedding: PositionTable
    ) -> Rows:
        """Return token_embedding[token] + position_embedding[position] of each token."""
        context = token_ids.shape[1]
        hidden = token_embedding[token_ids] + position_embedding[:context]
        return hidden.reshape(-1, token_embedding.shape[1])

    def embed_backward(
        self,
        grad_out: Rows,
        token_ids: TokenIds,
        grad_token_embedding: TokenTable,
        grad_position_embedding: PositionTable | None,
    ) -> None:
        """Add each row's gradient to its token's embedding, and to its position's if learned."""
        np.add.at(grad_token_embedding, token_ids.reshape(-1), grad_out)
        if grad_position_embedding is not None:
            batch, context = token_ids.shape
            per_position = grad_out.reshape(batch, context, -1).sum(axis=0)
            grad_position_embedding[:context] += per_position

    def layer_norm(
        self, x: Rows, gain: PerChannel, bias: PerChannel, epsilon: float
    ) -> tuple[Rows, PerToken, PerToken]:
        """Return gain * n + bias with n = (x - mean) * inverse, and each row's mean and inverse.

        inverse = 1 / sqrt(variance + epsilon).
        """
        mean = x.mean(axis=1)
        centred = x - mean[:, None]
        inverse = 1.0 / np.sqrt(np.square(centred).mean(axis=1) + epsilon)
        return gain * (centred * inverse[:, None]) + bias, mean, inverse

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
        """Return grad_x, added to `onto` if given, whose memory it may take.

            grad_gain = sum over rows of grad_y * n        grad_bias = sum over rows of grad_y
            g = grad_y * gain
            grad_x = inverse * (g - mean(g) - n * mean(g * n))

        The two means are the gradients through the row's mean and through its variance.
        """
        n = (x - mean[:, None]) * inverse[:, None]
        grad_gain += (grad_out * n).sum(axis=0)
        grad_bias += grad_out.sum(axis=0)
        g = grad_out * gain
        mean_g = g.mean(axis=1, keepdims=True)
        mean_gn = (g * n).mean(axis=1, keepdims=True)
        grad_x = inverse[:, None] * (g - mean_g - n * mean_gn)
        return grad_x if onto is None else onto + grad_x

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
        """Return f(z) or residual + z, and f'(z) or None; z = x @ weight + bias."""
        check_residual(activation, residual)
        z = x @ weight + bias
        if activation == "linear":
            return (z if residual is None else residual + z), None
        function = ACTIVATIONS[activation]
        return function(z), function.slope(z) if needs_slope else None

    def linear_backward(
        self,
        grad_out: Outputs,
        x: Inputs,
        weight: Weight,
        slope: Outputs | None,
        grad_weight: Weight,
        grad_bias: Bias,
    ) -> Inputs:
        """Return grad_x; may overwrite grad_out where there is a slope f'(z).

        grad_z = grad_y * f'(z)
        grad_weight = x^T @ grad_z     grad_bias = sum over rows of grad_z
        grad_x = grad_z @ weight^T
        """
        grad_z = grad_out if slope is None else grad_out * slope
        grad_weight += x.T @ grad_z
        grad_bias += grad_z.sum(axis=0)
        return grad_z @ weight.T

    def attention(self, qkv: QKV, shape: AttentionShape) -> tuple[Rows, LogSumExp]:
        """Return causal self-attention, and the logsumexp of each row of scores.

            S = scale * Q @ K^T, masked above the diagonal
            P = exp(S - logsumexp(S)), the softmax of each row
            out = dropout(P) @ V

        qkv is [tokens, 3 * d_model]: queries, keys, values, each with the heads side by side. The
        logsumexp is [batch, heads, context]; from it, the backward pass recomputes P.
        """
        queries, keys, values = _split_heads(qkv, shape)
        scores = _masked_scores(queries, keys, shape)
        peak = scores.max(axis=-1, keepdims=True)
        logsumexp = np.log(np.exp(scores - peak).sum(axis=-1, keepdims=True)) + peak
        weights = np.exp(scores - logsumexp) * _dropout_factors(shape, qkv.dtype)
        return _join_heads(weights @ values), logsumexp[..., 0]

    def attention_backward(
        self, grad_out: Rows, qkv: QKV, out: Rows, logsumexp: LogSumExp, shape: AttentionShape
    ) -> QKV:
        """Return grad_qkv, by the formulas of FlashAttention (Dao et al. 2022, arXiv:2205.14135).

        With M the factors of dropout (0 or 1 / (1 - rate)) and D = rowsum(grad_out * out):

            grad_V = (P * M)^T @ grad_out
            grad_S = P * (M * (grad_out @ V^T) - D)
            grad_Q = scale * grad_S @ K        grad_K = scale * grad_S^T @ Q

        grad_S is the softmax's: P_ij changes with S_ik by P_ij * ([j = k] - P_ik), so a score gets
        P * (its weight's gradient - the mean of the row's such gradients, weighted by P). That mean
        is D, because out is the sum of the values by the same weights; no second pass is needed.
        """
        queries, keys, values = _split_heads(qkv, shape)
        grad_heads = _heads(grad_out, shape)
        weights = np.exp(_masked_scores(queries, keys, shape) - logsumexp[..., None])
        factors = _dropout_factors(shape, qkv.dtype)
        row_dots = (grad_heads * _heads(out, shape)).sum(axis=-1, keepdims=True)
        grad_values = (weights * factors).swapaxes(-1, -2) @ grad_heads
        grad_weights = factors * (grad_heads @ values.swapaxes(-1, -2))
        grad_scores = weights * (grad_weights - row_dots)
        grad_queries = shape.scale * (grad_scores @ keys)
        grad_keys = shape.scale * (grad_scores.swapaxes(-1, -2) @ queries)
        return np.concatenate(
            [_join_heads(grad) for grad in (grad_queries, grad_keys, grad_values)], axis=1
        )

    def dropout(self, x: Rows, rate: float, key: Key, residual: Rows | None = None) -> Rows:
        """Return [residual +] x with elements set to 0 at `rate`, the others divided by 1 - rate.

        It is its own backward pass: the same elements of the gradient are 0. Dropout is of
        Srivastava et al. 2014.
        """
        kept = np.where(keep_mask(key, rate, x.shape), x * (1.0 / (1.0 - rate)), 0.0)
        kept = kept.astype(x.dtype, copy=False)
        return kept if residual is None else residual + kept

    def cross_entropy(
        self,
        hidden: Rows,
        head: TokenTable,
        targets: Targets,
        scale: float = 0.0,
        grad_head: TokenTable | None = None,
    ) -> tuple[float, Rows | None]:
        """Return the sum of -log softmax(logits)[target], and `scale` times its gradient.

            logits = hidden @ head^T
            grad_logits = scale * (softmax(logits) - onehot(target))
            grad_head = grad_logits^T @ hidden      grad_hidden = grad_logits @ head

        Loss and grad_logits of a row whose target is IGNORED are 0.

        The loss is the last operation, so its gradient is computed together with its value, a
        chunk of rows at a time: the logits of a whole batch are never in memory.
        """
        total = 0.0
        grad_hidden = None if grad_head is None else np.empty_like(hidden)
        for start in range(0, len(targets), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            is_ignored = targets[rows] == IGNORED
            columns = np.where(is_ignored, 0, targets[rows])
            losses, grad_logits = _losses(hidden[rows] @ head.T, columns)
            losses[is_ignored] = 0.0
            total += losses.sum(dtype=np.float64)
            if grad_head is not None and grad_hidden is not None:
                grad_logits[np.arange(len(losses)), columns] -= 1.0
                grad_logits *= scale
                grad_logits[is_ignored] = 0.0
                grad_head += grad_logits.T @ hidden[rows]
                grad_hidden[rows] = grad_logits @ head
        return float(total), grad_hidden

    def sum_of_squares(self, array: Array) -> float:
        """Return the sum of the squares of all elements, in float64."""
        return float(np.square(array, dtype=np.float64).sum())

    def adamw(
        self,
        parameters: Array,
        gradients: Array,
        first_moment: Array,
        second_moment: Array,
        settings: AdamWStep,
    ) -> None:
        """Update parameters and moments in place, and set the gradients to 0.

            g = gradient_scale * gradient
            m = beta1 * m + (1 - beta1) * g         v = beta2 * v + (1 - beta2) * g^2
            m^ = m / (1 - beta1^step)               v^ = v / (1 - beta2^step)
            p = p - learning_rate * (m^ / (sqrt(v^) + epsilon) + weight_decay * p)

        AdamW is of Loshchilov and Hutter 2019 (arXiv:1711.05101): the decay is not a part of the
        gradient, and so is not divided by sqrt(v^).
        """
        g = gradients * settings.gradient_scale
        first_moment += (1.0 - settings.beta1) * (g - first_moment)
        second_moment += (1.0 - settings.beta2) * (g * g - second_moment)
        corrected = first_moment / (1.0 - settings.beta1**settings.step)
        root = np.sqrt(second_moment / (1.0 - settings.beta2**settings.step))
        parameters *= 1.0 - settings.learning_rate * settings.weight_decay
        parameters -= settings.learning_rate * corrected / (root + settings.epsilon)
        gradients[...] = 0.0


def _heads(rows: Rows, shape: AttentionShape) -> Float[np.ndarray, "batch heads context head_dim"]:
    """Return a view of [tokens, d_model] by sequence and head."""
    split = rows.reshape(shape.batch, shape.context, shape.heads, -1)
    return split.transpose(0, 2, 1, 3)


def _split_heads(qkv: QKV, shape: AttentionShape) -> tuple[Array, Array, Array]:
    """Return views of queries, keys and values, each [batch, heads, context, head_dim]."""
    queries, keys, values = np.split(qkv, 3, axis=1)
    return _heads(queries, shape), _heads(keys, shape), _heads(values, shape)


def _join_heads(heads: Float[np.ndarray, "batch heads context head_dim"]) -> Rows:
    """Return [tokens, d_model], the heads side by side."""
    batch, count, context, head_dim = heads.shape
    return heads.transpose(0, 2, 1, 3).reshape(batch * context, count * head_dim)


def _masked_scores(queries: Array, keys: Array, shape: AttentionShape) -> Array:
    """Return scale * Q @ K^T, -inf where a key comes after its query."""
    scores = shape.scale * (queries @ keys.swapaxes(-1, -2))
    if not shape.is_causal:
        return scores
    is_future = np.triu(np.ones((shape.context, shape.context), dtype=bool), k=1)
    scores[..., is_future] = -np.inf
    return scores


def _dropout_factors(shape: AttentionShape, dtype: np.dtype) -> Array:
    """Return 0 or 1 / (1 - rate) for each attention weight [batch, heads, query, key]."""
    if shape.key is None:
        return np.ones((), dtype=dtype)
    square = (shape.batch, shape.heads, shape.context, shape.context)
    return keep_mask(shape.key, shape.dropout, square).astype(dtype) / (1.0 - shape.dropout)


def _losses(logits: Array, targets: Targets) -> tuple[Array, Array]:
    """Return -log softmax(logits)[target] of each row, and the softmax."""
    logits = logits - logits.max(axis=1, keepdims=True)
    target_logits = logits[np.arange(len(targets)), targets]
    exps = np.exp(logits, out=logits)
    sums = exps.sum(axis=1, keepdims=True)
    losses = np.log(sums[:, 0]) - target_logits
    exps /= sums
    return losses, exps
