"""Step 3: layer normalization (Ba, Kiros and Hinton 2016, arXiv:1607.06450)."""

import numpy as np


def layer_norm(
    hidden: np.ndarray, gain: np.ndarray, bias: np.ndarray, epsilon: float
) -> np.ndarray:
    """Return gain * (x - mean) / sqrt(variance + epsilon) + bias of each row x.

    Each row has a mean and a variance of its own; the variance is the mean of (x - mean)^2.

    Args:
        hidden: [tokens, d_model], float32. It must not be changed.
        gain: [d_model].
        bias: [d_model].
        epsilon: keeps the root away from zero, such as 1e-5.

    Returns:
        [tokens, d_model], float32.
    """
    centred = hidden - hidden.mean(axis=1, keepdims=True)
    variance = np.square(centred).mean(axis=1, keepdims=True)
    return gain * (centred / np.sqrt(variance + np.float32(epsilon))) + bias
