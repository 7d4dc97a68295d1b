"""Linear layers, and the two ways in which the NumPy forward pass can take a matrix product.

`product` hands the whole batch to BLAS: fastest, but BLAS chooses its kernel by the number of rows, so that one row's result may
differ in the last bits from batch to batch. `product_in_tiles` cuts the rows into tiles of a fixed height, padded with zeros: BLAS
then does the same operations for a row whatever else is computed, and its bits are always the same.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from nanovllm.model.weights import Linear

TILE_ROWS = 16

Product = Callable[[Float32[np.ndarray, "rows d_in"], Float32[np.ndarray, "d_in d_out"]], Float32[np.ndarray, "rows d_out"]]


def linear(hidden: Float32[np.ndarray, "tokens d_in"], layer: Linear, product: Product) -> Float32[np.ndarray, "tokens d_out"]:
    """hidden @ weight + bias."""
    out = product(hidden, layer.weight)
    out += layer.bias
    return out


def product(rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]) -> Float32[np.ndarray, "rows d_out"]:
    """rows @ weight."""
    return rows @ weight


def product_in_tiles(rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]) -> Float32[np.ndarray, "rows d_out"]:
    """rows @ weight with bits that depend on nothing but the row and the weight."""
    count = rows.shape[0]
    out = np.empty((count, weight.shape[1]), dtype=np.float32)
    tile = np.zeros((TILE_ROWS, rows.shape[1]), dtype=np.float32)
    for start in range(0, count, TILE_ROWS):
        used = min(TILE_ROWS, count - start)
        tile[:used] = rows[start : start + used]
        tile[used:] = 0.0
        out[start : start + used] = (tile @ weight)[:used]
    return out
