"""Vector passes over one row of scores.

A row is copied to the thread's scratch memory, where it stays in the core's own cache, and padded
with minus infinity to whole groups of GROUP_VECTORS vectors. A column is one lane of a group:

    group 0   | v0  |   a column is lane 0 of v0, v1, ... v15;
              | v1  |   its maximum tells whether any of its 16 scores can matter,
              | ... |   so most columns are never read in a search for few scores
              | v15 |
    group 1   | ... |

The weight of a score is exp(score - largest), or 0 below a threshold.
"""

import math

from numba import types

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.sampling.philox import hash_tokens
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS
from nanovllm.model.kernels.simd.kernel import Float, kernel_maker
from nanovllm.model.kernels.simd.memory import ordered_bits
from nanovllm.model.kernels.simd.value import F32, F64, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors

MAX_DISTANCE = 87.0
"""Scores further below the largest weigh nothing in top_p: exp(-87) is 1e-38."""
LOWEST = -3.4028234663852886e38
"""The lowest finite float32."""
_INFINITY = float("inf")
_LOG2_E = math.log2(math.e)


@kernel_maker()
def make_fill(v: Vectors, out: Value, count: Value, number: Float) -> None:
    """Make fill(out, count, number): set `count` float32, rounded up to vectors, to one number."""
    value = v.splat(number)
    with v.range(count, v.lanes) as i:
        v.store(value, v.element(out, i))


@kernel_maker()
def make_scale(
    v: Vectors, source: Value, out: Value, count: Value, padded: Value, temperature: Float
) -> None:
    """Make scale(source, out, count, padded, temperature): out = source / temperature.

    NaN becomes infinity, so that the largest score shows both. A finite score that would overflow
    stays finite, and -0.0 becomes 0.0.

    Arguments of scale:
        source: address of exactly `count` float32.
        out: address of `padded` float32, minus infinity from `count` on; may be `source`.
        count: number of scores.
        padded: `count` rounded up to whole groups.
        temperature: divisor.
    """
    lanes = v.lanes
    divisor = v.splat(temperature)
    whole = count & -lanes
    rest = count - whole

    def scaled(x: Value) -> Value:
        finite = v.minimum(x / divisor + 0.0, -LOWEST)
        is_below_infinity = x < _INFINITY
        return v.where(is_below_infinity, finite, _INFINITY)

    with v.range(whole, lanes) as i:
        v.store(scaled(v.load(v.element(source, i))), v.element(out, i))
    with v.range(rest) as i:
        index = whole + i
        v.store(v.load_scalar(v.element(source, index)), v.element(out, index))
    with v.range(padded - whole, lanes) as i:
        address = v.element(out, whole + i)
        inside = v.first_lanes(rest - i)
        v.store(v.where(inside, scaled(v.load(address)), -_INFINITY), address)


@kernel_maker(returns=types.float32)
def make_maxima(v: Vectors, scores: Value, groups: Value, maxima: Value) -> Value:
    """Make maxima(scores, groups, maxima) -> the largest score.

    It writes the maximum of each column to `maxima`, `lanes` of them a group.
    """
    lanes = v.lanes

    def group(g: Value, best: Value) -> Value:
        start = v.element(scores, g * (GROUP_VECTORS * lanes))
        highest = v.load(start)
        for vector in range(1, GROUP_VECTORS):
            highest = v.maximum(v.load(start, vector * lanes * WORD_BYTES), highest)
        v.store(highest, v.element(maxima, g * lanes))
        return v.maximum(highest, best)

    return v.largest(v.fold(groups, 1, v.constant(-_INFINITY), group))


@kernel_maker(returns=types.float64)
def make_sum_weights(
    v: Vectors, scores: Value, groups: Value, least: Float, largest: Float
) -> Value:
    """Make sum_weights(scores, groups, least, largest) -> the sum of all weights, in float64.

    Lanes are summed in float64, one group after the other.
    """
    lanes = v.lanes
    least, largest = v.splat(least), v.splat(largest)

    def group(g: Value, total: Value) -> Value:
        start = v.element(scores, g * (GROUP_VECTORS * lanes))

        def vector(i: Value, subtotal: Value) -> Value:
            score = v.load(v.element(start, i))
            weight = v.where(score >= least, v.exp(score - largest), 0.0)
            return subtotal + weight.to_double()

        zeros, size = v.constant(0.0, F64), v.scalar(GROUP_VECTORS * lanes)
        return total + v.sum(v.fold(size, lanes, zeros, vector))

    return v.fold(groups, 1, v.scalar(0.0, F64), group)


@kernel_maker(returns=types.float32)
def make_bound_race(
    v: Vectors,
    scores: Value,
    groups: Value,
    least: Float,
    largest: Float,
    word0: Value,
    word1: Value,
    word2: Value,
    maxima: Value,
) -> Value:
    """Make bound_race(scores, groups, least, largest, word0, word1, word2, maxima) -> the largest
    upper bound of log2(weight / noise). It writes the largest of each column to `maxima`.

    -log(u) is at least 1 - u, and log2(x) at least the exponent of x plus its fraction. So the
    bound needs no logarithm: the bits of a float32, as an integer, are both (Mitchell 1962,
    "Computer multiplication and division using binary logarithms"). It is less than 0.1 above the
    value for small noise, which is what wins. Rounding changes it by less than 1e-4.

    Arguments of bound_race:
        least, largest: bounds of the scores that are kept.
        word0, word1, word2: key of the draw.
        maxima: address of the largest score of each column; overwritten. A column without a score
            from `least` up gets minus infinity.
    """
    lanes = v.lanes
    size = GROUP_VECTORS * lanes
    nothing = v.constant(-_INFINITY)
    limit, least, largest = least, v.splat(least), v.splat(largest)
    words = v.integer_argument(word0), v.integer_argument(word1), v.integer_argument(word2)

    def group(g: Value, best: Value) -> Value:
        column, start = v.element(maxima, g * lanes), g * size
        highest = v.load(column)
        v.store(nothing, column)
        with v.when(v.largest(highest) >= limit):

            def bound(i: Value, best: Value) -> Value:
                token = start + i
                score = v.load(v.element(scores, token))
                bits = hash_tokens(v.integer_argument(token) + v.lane_numbers(), words)
                # (1 - u) * 2**31 without its last bit, which makes it smaller and signed
                rest = (~bits).lshr(1).to_float()
                log_rest = v.fma(rest.bitcast(I32).to_float(), 2.0**-23, -127.0 - 31.0)
                value = v.fma(score - largest, _LOG2_E, -log_rest)
                return v.maximum(v.where(score >= least, value, -_INFINITY), best)

            v.store(v.fold(v.scalar(size), lanes, nothing, bound), column)
        return v.maximum(v.load(column), best)

    return v.largest(v.fold(groups, 1, nothing, group))


@kernel_maker()
def make_weigh_keys(v: Vectors, keys: Value, count: Value, largest: Float, weights: Value) -> None:
    """Make weigh_keys(keys, count, largest, weights): the weights of scores given as int32 keys.

    `count` is rounded up to whole vectors.
    """
    lanes = v.lanes
    largest = v.splat(largest)

    with v.range(count, lanes) as i:
        key = v.load(v.element(keys, i)).bitcast(I32)
        score = ordered_bits(key).bitcast(F32)
        v.store(v.exp(score - largest), v.element(weights, i))


@kernel_maker(returns=types.intp)
def make_rank(v: Vectors, scores: Value, padded: Value, token: Value, own: Float) -> Value:
    """Make rank(scores, padded, token, own) -> the number of tokens that rank before `token`.

    A token ranks before another if its score is larger, or equal and its id lower. `own` is the
    score of `token`.
    """
    lanes = v.lanes
    own_score = v.splat(own)

    def count_vector(i: Value, count: Value) -> Value:
        score = v.load(v.element(scores, i))
        tied = (score == own_score) & v.first_lanes(token - i)
        ahead = (score > own_score) | tied
        return count + ahead.zext(I32)

    counts = v.fold(padded, lanes, v.integers(0), count_vector)
    total = v.scalar(0)
    for lane in range(lanes):
        total = total + counts.lane(lane).zext(I64)
    return total
