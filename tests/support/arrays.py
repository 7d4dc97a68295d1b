"""Arrays for tests of kernels."""

import numpy as np


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return normally distributed float32."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def as_int16_inputs(rows: np.ndarray) -> np.ndarray:
    """Return rows of bytes as int16 inputs: in the order 0, 2, 1, 3 of each four numbers."""
    padded = np.zeros((*rows.shape[:-1], -(-rows.shape[-1] // 4) * 4), dtype=np.uint16)
    padded[..., : rows.shape[-1]] = rows
    return padded.reshape(*rows.shape[:-1], -1, 4)[..., [0, 2, 1, 3]].reshape(padded.shape)


def widened(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
