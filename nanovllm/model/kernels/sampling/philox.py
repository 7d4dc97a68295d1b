"""Random numbers of one row, the compiled twin of nanovllm/model/philox.py."""

import math
from typing import Any

from numba import types

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.simd.kernel import emitted
from nanovllm.model.kernels.simd.value import I32, I64, Value
from nanovllm.model.philox import HASH_ROUNDS, HASH_SHIFT

_LOW = 0xFFFFFFFF


@compiled
def draw_key(seed: int, choice: int, position: int) -> Any:
    """Return the three words of a draw's key, a function of the arguments alone.

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
    return c0, c1, c2


def hash_tokens(tokens: Value, words: tuple[Value, Value, Value]) -> Value:
    """Emit the hash of int32 token ids, a scalar or a vector, with the words of a key."""
    for word, (shift, factor) in zip(words, HASH_ROUNDS, strict=True):
        tokens = tokens + word
        tokens = (tokens ^ tokens.lshr(shift)) * factor
    return tokens ^ tokens.lshr(HASH_SHIFT)


@emitted(types.intp)
def _random_bits(token: Value, word0: Value, word1: Value, word2: Value) -> Value:
    words = word0.trunc(I32), word1.trunc(I32), word2.trunc(I32)
    return hash_tokens(token.trunc(I32), words).zext(I64)


@compiled
def exponential(token: int, word0: int, word1: int, word2: int) -> Any:
    """Return the exponential random number of a token, a float64."""
    return -math.log((_random_bits(token, word0, word1, word2) + 0.5) * 2.0**-32)
