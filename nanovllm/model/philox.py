"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As
Easy as 1, 2, 3").

A draw is a function of (seed, choice index, position) alone. So a request gets the same tokens in
any batch, in any order of the rows, and again after a preemption.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt32, UInt64

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(
    counter: UInt32[np.ndarray, "4 rows"], key: UInt32[np.ndarray, "2 rows"]
) -> UInt32[np.ndarray, "4 rows"]:
    """Return ten rounds of Philox for each column: four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = (
            c0.astype(np.uint64) * _MULTIPLIERS[0],
            c2.astype(np.uint64) * _MULTIPLIERS[1],
        )
        high0, low0 = (product0 >> _HALF).astype(np.uint32), (product0 & _LOW).astype(np.uint32)
        high1, low1 = (product1 >> _HALF).astype(np.uint32), (product1 & _LOW).astype(np.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack([c0, c1, c2, c3])


def uniform(
    seeds: UInt64[np.ndarray, " rows"],
    choices: Int64[np.ndarray, " rows"],
    positions: Int64[np.ndarray, " rows"],
) -> Float64[np.ndarray, " rows"]:
    """Return a number in [0, 1) for each row, with 53 random bits."""
    unused = np.zeros(seeds.shape, dtype=np.uint32)
    counter = np.stack([positions.astype(np.uint32), choices.astype(np.uint32), unused, unused])
    key = np.stack([(seeds & _LOW).astype(np.uint32), (seeds >> _HALF).astype(np.uint32)])
    words = philox4x32(counter, key).astype(np.uint64)
    bits = (words[0] << _HALF | words[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
