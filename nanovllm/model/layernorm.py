"""Layer normalisation (Ba, Kiros and Hinton 2016, arXiv:1607.06450)."""

import numpy as np
from jaxtyping import Float32


def layer_norm(
    hidden: Float32[np.ndarray, "tokens d_model"],
    gain: Float32[np.ndarray, " d_model"],
    bias: Float32[np.ndarray, " d_model"],
    epsilon: float,
) -> Float32[np.ndarray, "tokens d_model"]:
    """Each row shifted to mean 0, scaled to variance 1, then times gain plus bias.

    The variance is taken around the mean in a second pass: in a row whose mean is far from 0, mean(x^2) - mean(x)^2 is the small
    difference of two large numbers, and loses its digits in float32.
    """
    centred = hidden - hidden.mean(axis=1, keepdims=True, dtype=np.float32)
    variance = np.square(centred).mean(axis=1, keepdims=True, dtype=np.float32)
    centred *= np.float32(1.0) / np.sqrt(variance + np.float32(epsilon))
    centred *= gain
    centred += bias
    return centred
