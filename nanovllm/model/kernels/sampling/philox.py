"""Philox random numbers of one row, the compiled twin of nanovllm/model/philox.py."""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled

_LOW = 0xFFFFFFFF


@compiled
def uniform(seed: int, choice: int, position: int) -> Any:
    """Return a float64 in [0, 1) with 53 random bits, a function of the arguments alone.

    Products of 32-bit words may wrap to negative numbers; their bits are the same.
    """
    c0, c1, c2, c3 = position & _LOW, choice & _LOW, 0, 0
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return ((c0 << 21) | (c1 >> 11)) * 2.0**-53
