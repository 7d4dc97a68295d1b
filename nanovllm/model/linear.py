"""Linear layers, and the two ways in which the NumPy forward pass can take a matrix product.

`product` hands the whole batch to BLAS: fastest, but BLAS chooses its kernel by the number of rows, and treats the rows at a tile's
edge otherwise than those inside, so that one row's result may differ in the last bits from batch to batch. `product_by_rows` hands it
one row at a time: the operations for a row are then the same whatever else is computed, and so are its bits.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from nanovllm.model.weights import Linear

Product = Callable[
    [Float32[np.ndarray, "rows d_in"], Float32[np.ndarray, "d_in d_out"]],
    Float32[np.ndarray, "rows d_out"],
]


def linear(
    hidden: Float32[np.ndarray, "tokens d_in"], layer: Linear, product: Product
) -> Float32[np.ndarray, "tokens d_out"]:
    """hidden @ weight + bias."""
    out = product(hidden, layer.weight)
    out += layer.bias
    return out


def product(
    rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]
) -> Float32[np.ndarray, "rows d_out"]:
    """rows @ weight."""
    return rows @ weight


def product_by_rows(
    rows: Float32[np.ndarray, "rows d_in"], weight: Float32[np.ndarray, "d_in d_out"]
) -> Float32[np.ndarray, "rows d_out"]:
    """rows @ weight with bits that depend on nothing but the row and the weight."""
    out = np.empty((rows.shape[0], weight.shape[1]), dtype=np.float32)
    for row in range(rows.shape[0]):
        out[row] = rows[row] @ weight
    return out
