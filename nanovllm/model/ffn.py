"""The feed-forward block: widen, activate, narrow."""

import numpy as np
from jaxtyping import Float32

from nanovllm.model.activation import Activation
from nanovllm.model.linear import Product, linear
from nanovllm.model.weights import FeedForwardWeights

ACTIVATION_ROWS = 32  # rows activated at a time, so that the temporaries stay in a core's own cache


def feed_forward(
    hidden: Float32[np.ndarray, "tokens d_model"],
    weights: FeedForwardWeights,
    activation: Activation,
    product: Product,
) -> Float32[np.ndarray, "tokens d_model"]:
    """activation(hidden @ up + bias) @ down + bias."""
    middle = linear(hidden, weights.up, product)
    for start in range(0, middle.shape[0], ACTIVATION_ROWS):
        rows = slice(start, start + ACTIVATION_ROWS)
        middle[rows] = activation(middle[rows])
    return linear(middle, weights.down, product)
