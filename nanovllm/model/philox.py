"""Random numbers of draws, as functions of a key: no generator has a state.

The number of a token depends on (seed, choice index, position, token id) alone. So a request gets
the same tokens in any batch, in any order of the rows, and again after a preemption.

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") makes one key of
(seed, choice index, position). A hash of 32 bits makes a number of the key and each token: triple32
(Wellons 2018, https://github.com/skeeto/hash-prospector) with a word of the key added in each of
its rounds. For one key it is a bijection, so no two tokens get the same number.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt32, UInt64

HASH_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
"""Shift and factor of each round of the hash: x += word; x ^= x >> shift; x *= factor."""
HASH_SHIFT = 14
"""The last step of the hash: x ^= x >> 14."""
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


def draw_keys(
    seeds: UInt64[np.ndarray, " rows"],
    choices: Int64[np.ndarray, " rows"],
    positions: Int64[np.ndarray, " rows"],
) -> UInt32[np.ndarray, "rows 3"]:
    """Return the key of each row's draw."""
    unused = np.zeros(seeds.shape, dtype=np.uint32)
    counter = np.stack([positions.astype(np.uint32), choices.astype(np.uint32), unused, unused])
    key = np.stack([(seeds & _LOW).astype(np.uint32), (seeds >> _HALF).astype(np.uint32)])
    return philox4x32(counter, key)[:3].T


def exponentials(key: UInt32[np.ndarray, " 3"], vocab: int) -> Float64[np.ndarray, " vocab"]:
    """Return an exponential random number of mean 1 for each token: -log(u), u uniform in (0, 1).

    u is (bits + 1/2) / 2**32, so results are from 1.2e-10 to 22.9.
    """
    bits = np.arange(vocab, dtype=np.uint32)
    for word, (shift, factor) in zip(key, HASH_ROUNDS, strict=True):
        bits += word
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(HASH_SHIFT)
    return -np.log((bits + 0.5) * 2.0**-32)
