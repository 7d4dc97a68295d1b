"""Arrays for tests of kernels."""

import numpy as np


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normally distributed float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
