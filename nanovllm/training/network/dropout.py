"""Counter-based dropout masks: element i of a site is kept by a function of (key, i) alone.

So a backward pass recomputes the mask instead of storing it, and neither the number of threads nor
an interruption changes a run. The mixer is lowbias32 of Chris Wellons' hash-prospector
(https://github.com/skeeto/hash-prospector, public domain), applied to the index and twice keyed.
"""

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

Key = UInt64[np.ndarray, "1"]
"""The key of one use of dropout: an array, which the next pass may fill with another key."""

SHIFTS_AND_MULTIPLIERS = ((16, 0x7FEB352D), (15, 0x846CA68B))
LAST_SHIFT = 16
MAX_ELEMENTS = 1 << 32
"""Elements of a site, which a 32-bit counter numbers."""


def mix(words: UInt32[np.ndarray, "..."]) -> UInt32[np.ndarray, "..."]:
    """Return lowbias32 of each word: a bijection whose output bits are close to unbiased."""
    for shift, multiplier in SHIFTS_AND_MULTIPLIERS:
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(multiplier)
    return words ^ (words >> np.uint32(LAST_SHIFT))


def site_key(seed: int, step: int, group: int, site: int) -> Key:
    """Return the key of one use of dropout.

    Args:
        seed: of the run.
        step: batches before this one.
        group: forward passes of the batch before this one.
        site: number of the use in the forward pass.
    """
    return np.random.SeedSequence((seed, step, group, site)).generate_state(1, np.uint64)


def threshold(rate: float) -> int:
    """Return the smallest 32-bit word that keeps an element: `rate` of all words are below."""
    return min(round(rate * MAX_ELEMENTS), MAX_ELEMENTS - 1)


def keep_mask(key: Key, rate: float, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Return whether each element of a site is kept, for elements numbered in C order."""
    index = np.arange(np.prod(shape, dtype=np.int64)).astype(np.uint32)
    low, high = key.astype("<u8").view("<u4")
    words = mix(mix(index ^ low) + high)
    return (words >= np.uint32(threshold(rate))).reshape(shape)
