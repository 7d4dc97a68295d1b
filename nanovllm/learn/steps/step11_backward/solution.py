"""Step 11: gradients by hand, AdamW, and a training loop.

If L is the loss, the gradient of an array x is dL/dx. It has the shape of x. The backward pass of
an operation takes the gradient of its output and returns those of its inputs.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nanovllm.learn.steps.step02_logits.solution import cross_entropy, embed, logits, softmax
from nanovllm.learn.steps.step03_layer_norm.solution import layer_norm
from nanovllm.learn.steps.step04_attention.solution import (
    attention,
    attention_weights,
    merge_heads,
    split_heads,
)
from nanovllm.learn.steps.step05_forward.solution import gelu, linear
from nanovllm.model.weights import Layer, Linear, ModelWeights

Gradients = dict[str, np.ndarray]
_PARTS = ("attention_norm", "qkv", "out", "ffn_norm", "up", "down")


def linear_backward(
    grad: np.ndarray, rows: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of rows, weight and bias of `rows @ weight + bias`.

    Args:
        grad: gradient of the result, [tokens, d_out].
        rows: [tokens, d_in].
        weight: [d_in, d_out].

    Returns:
        [tokens, d_in], [d_in, d_out] and [d_out].
    """
    return grad @ weight.T, rows.T @ grad, grad.sum(axis=0)


def cross_entropy_backward(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean of -log softmax(logits)[target]: (P - onehot) / tokens.

    P is the softmax of each row, onehot is 1 at the row's target and 0 elsewhere.

    Args:
        logits: [tokens, vocab].
        targets: the token that follows, [tokens].

    Returns:
        [tokens, vocab].
    """
    grad = softmax(logits)
    grad[np.arange(len(targets)), targets] -= 1
    return grad / len(targets)


def layer_norm_backward(
    grad: np.ndarray, hidden: np.ndarray, gain: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of hidden, gain and bias of step 3's layer normalization.

    With n = (x - mean) / sqrt(variance + epsilon) and g = grad * gain, the gradient of x is
    (g - mean(g) - n * mean(g * n)) / sqrt(variance + epsilon). The means are those of the row.

    Args:
        grad: gradient of the result, [tokens, d_model].
        hidden: [tokens, d_model].
        gain: [d_model].
        epsilon: that of the forward pass.

    Returns:
        [tokens, d_model], [d_model] and [d_model].
    """
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    root = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + epsilon)
    normal = centred / root
    scaled = grad * gain
    mean = scaled.mean(axis=1, keepdims=True)
    along = (scaled * normal).mean(axis=1, keepdims=True)
    return (scaled - mean - normal * along) / root, (grad * normal).sum(axis=0), grad.sum(axis=0)


def attention_backward(
    grad: np.ndarray, queries: np.ndarray, keys: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of queries, keys and values of step 4's causal attention.

    P are the attention weights and dP their gradients. The gradient of the scores is P * (dP - D),
    where D is the sum of P * dP over the keys, one number for each query. Do not forget that the
    scores were divided by sqrt(head_dim).

    Args:
        grad: gradient of the result, [heads, tokens, head_dim].
        queries, keys, values: [heads, tokens, head_dim].

    Returns:
        Three arrays [heads, tokens, head_dim].
    """
    weights = attention_weights(queries, keys)
    grad_values = weights.transpose(0, 2, 1) @ grad
    grad_weights = grad @ values.transpose(0, 2, 1)
    dots = (weights * grad_weights).sum(axis=2, keepdims=True)
    grad_scores = weights * (grad_weights - dots) / math.sqrt(queries.shape[2])
    return grad_scores @ keys, grad_scores.transpose(0, 2, 1) @ queries, grad_values


def clip_gradients(gradients: Gradients, max_norm: float) -> float:
    """Scale all gradients in place by one factor, so that their common norm is at most `max_norm`.

    The norm is the root of the sum of the squares of all elements of all arrays.

    Returns:
        The norm before clipping.
    """
    norm = math.sqrt(sum(float(np.square(array).sum()) for array in gradients.values()))
    if norm > max_norm:
        for name in gradients:
            gradients[name] *= max_norm / norm
    return norm


def learning_rate(step: int, peak: float, floor: float, warmup_steps: int, steps: int) -> float:
    """Return the learning rate of a step: linear warmup, then half a cosine from peak to floor.

    Warmup:  peak * (step + 1) / (warmup_steps + 1)
    Cosine:  floor + (peak - floor) * (1 + cos(pi * progress)) / 2, where progress grows from 0
             at the first step after the warmup to 1 at step `steps`

    Args:
        step: from 0.
        peak: the largest learning rate.
        floor: the smallest, which all steps from `steps` on have.
        warmup_steps: steps before the peak.
        steps: steps of the whole training.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step >= steps:
        return floor
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


class AdamW:
    """Updates parameters by their gradients (Loshchilov and Hutter 2019, arXiv:1711.05101).

    g = gradient
    m = beta1 * m + (1 - beta1) * g          v = beta2 * v + (1 - beta2) * g^2
    m^ = m / (1 - beta1^update)              v^ = v / (1 - beta2^update)
    p = p - learning_rate * (m^ / (sqrt(v^) + epsilon) + weight_decay * p)

    m and v begin as zeros, the first update is number 1. The last term, weight decay, is for
    matrices only: arrays of two axes, token_embedding among them, but not the one with the name
    "position_embedding".
    """

    def __init__(
        self,
        parameters: dict[str, np.ndarray],
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
    ) -> None:
        """Keep the parameters, which `update` changes in place, and moments of zeros."""
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.updates = 0
        self.first = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.second = {name: np.zeros_like(array) for name, array in parameters.items()}

    def update(self, gradients: Gradients, learning_rate: float) -> None:
        """Change every parameter in place; `gradients` has an array for each name."""
        self.updates += 1
        for name, g in gradients.items():
            parameter, m, v = self.parameters[name], self.first[name], self.second[name]
            m += (1 - self.beta1) * (g - m)
            v += (1 - self.beta2) * (g * g - v)
            corrected = m / (1 - self.beta1**self.updates)
            root = np.sqrt(v / (1 - self.beta2**self.updates))
            if parameter.ndim == 2 and name != "position_embedding":
                parameter *= 1 - learning_rate * self.weight_decay
            parameter -= learning_rate * corrected / (root + self.epsilon)


def train(
    weights: ModelWeights,
    heads: int,
    epsilon: float,
    tokens: np.ndarray,
    starts: np.ndarray,
    context: int,
    optimizer: AdamW,
    rate: Callable[[int], float],
    max_norm: float,
) -> list[float]:
    """Train the weights in place, and return the mean loss of each step before its update.

    A step averages loss and gradients over its sequences, clips the gradients, and updates with
    the step's learning rate. The inputs of a sequence are tokens[start : start + context], the
    targets tokens[start + 1 : start + context + 1]. `loss_and_gradients` below does the rest.

    Args:
        weights: the model; `optimizer` has its arrays, by `named_arrays`.
        heads, epsilon: as in the forward pass.
        tokens: the text, [tokens].
        starts: first token of each sequence of each step, [steps, sequences].
        context: tokens of a sequence.
        optimizer: updates the weights.
        rate: gives the learning rate of a step, from 0.
        max_norm: the largest norm of the gradients.
    """
    losses = []
    for step, batch in enumerate(starts):
        loss = 0.0
        arrays = named_arrays(weights)
        gradients = {name: np.zeros_like(array) for name, array in arrays.items()}
        for start in batch:
            inputs = tokens[start : start + context]
            targets = tokens[start + 1 : start + context + 1]
            one_loss, found = loss_and_gradients(weights, heads, epsilon, inputs, targets)
            loss += one_loss / len(batch)
            for name, array in found.items():
                gradients[name] += array / len(batch)
        clip_gradients(gradients, max_norm)
        optimizer.update(gradients, rate(step))
        losses.append(loss)
    return losses


def gelu_backward(grad: np.ndarray, rows: np.ndarray) -> np.ndarray:  # given
    """Return the gradient of `rows` of gelu(rows): `grad` times the slope of gelu at `rows`."""
    t = np.tanh(math.sqrt(2 / math.pi) * (rows + 0.044715 * rows**3))
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * rows**2)
    return grad * (0.5 * (1 + t) + 0.5 * rows * (1 - t * t) * inner_slope)


def named_arrays(weights: ModelWeights) -> dict[str, np.ndarray]:  # given
    """Return all arrays of a model by name, such as "0.qkv.weight" of the first layer.

    The head is the token embedding itself, as in GPT-2, so it has no name of its own.
    """
    arrays = {
        "token_embedding": weights.token_embedding,
        "position_embedding": weights.position_embedding,
        "final_norm.gain": weights.final_norm.gain,
        "final_norm.bias": weights.final_norm.bias,
    }
    for index, layer in enumerate(weights.layers):
        for part in _PARTS:
            pair = getattr(layer, part)
            for name in ("weight", "bias") if isinstance(pair, Linear) else ("gain", "bias"):
                arrays[f"{index}.{part}.{name}"] = getattr(pair, name)
    return arrays


def loss_and_gradients(  # given
    weights: ModelWeights, heads: int, epsilon: float, token_ids: np.ndarray, targets: np.ndarray
) -> tuple[float, Gradients]:
    """Return the mean loss of a sequence and its gradients, named as in `named_arrays`.

    The forward pass saves what the backward pass needs, which goes through the model in reverse.
    """
    positions = np.arange(len(token_ids))
    hidden = embed(token_ids, positions, weights.token_embedding, weights.position_embedding)
    saved = []
    for layer in weights.layers:
        hidden, one = _block_forward(hidden, layer, heads, epsilon)
        saved.append(one)
    norm = weights.final_norm
    final = layer_norm(hidden, norm.gain, norm.bias, epsilon)
    scores = logits(final, weights.head)
    loss = cross_entropy(scores, targets)

    found: Gradients = {}
    grad_logits = cross_entropy_backward(scores, targets)
    grad, grad_head, _ = linear_backward(grad_logits, final, weights.head.T)
    grad, gain, bias = layer_norm_backward(grad, hidden, norm.gain, epsilon)
    found |= {"final_norm.gain": gain, "final_norm.bias": bias}
    for index in reversed(range(len(saved))):
        layer = weights.layers[index]
        grad, one_found = _block_backward(grad, layer, heads, epsilon, saved[index])
        found |= {f"{index}.{name}": array for name, array in one_found.items()}
    found["position_embedding"] = np.zeros_like(weights.position_embedding)
    found["position_embedding"][: len(token_ids)] = grad
    found["token_embedding"] = np.ascontiguousarray(grad_head.T)
    np.add.at(found["token_embedding"], token_ids, grad)  # a token may occur several times
    return loss, found


def _block_forward(  # given
    hidden: np.ndarray, layer: Layer[Linear], heads: int, epsilon: float
) -> tuple[np.ndarray, Any]:
    """Return a block's result, and what its backward pass needs."""
    norm = layer.attention_norm
    normed = layer_norm(hidden, norm.gain, norm.bias, epsilon)
    columns = np.split(linear(normed, layer.qkv), 3, axis=1)
    qkv = [split_heads(rows, heads) for rows in columns]
    mixed = merge_heads(attention(*qkv))
    middle = hidden + linear(mixed, layer.out)
    ffn_normed = layer_norm(middle, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)
    up = linear(ffn_normed, layer.up)
    ffn_hidden = gelu(up)
    saved = (hidden, normed, qkv, mixed, middle, ffn_normed, up, ffn_hidden)
    return middle + linear(ffn_hidden, layer.down), saved


def _block_backward(  # given
    grad: np.ndarray, layer: Layer[Linear], heads: int, epsilon: float, saved: Any
) -> tuple[np.ndarray, Gradients]:
    """Return the gradient of the block's input, and those of its arrays.

    The residual connections use an array twice, so its gradient is the sum of two.
    """
    hidden, normed, qkv, mixed, middle, ffn_normed, up, ffn_hidden = saved
    found: Gradients = {}

    def linear_part(name: str, grad: np.ndarray, rows: np.ndarray, part: Linear) -> np.ndarray:
        result, found[f"{name}.weight"], found[f"{name}.bias"] = linear_backward(
            grad, rows, part.weight
        )
        return result

    def norm_part(name: str, grad: np.ndarray, rows: np.ndarray, gain: np.ndarray) -> np.ndarray:
        result, found[f"{name}.gain"], found[f"{name}.bias"] = layer_norm_backward(
            grad, rows, gain, epsilon
        )
        return result

    grad_up = gelu_backward(linear_part("down", grad, ffn_hidden, layer.down), up)
    grad_normed = linear_part("up", grad_up, ffn_normed, layer.up)
    grad = grad + norm_part("ffn_norm", grad_normed, middle, layer.ffn_norm.gain)
    grad_mixed = split_heads(linear_part("out", grad, mixed, layer.out), heads)
    grads = [merge_heads(rows) for rows in attention_backward(grad_mixed, *qkv)]
    grad_normed = linear_part("qkv", np.concatenate(grads, axis=1), normed, layer.qkv)
    return grad + norm_part("attention_norm", grad_normed, hidden, layer.attention_norm.gain), found
