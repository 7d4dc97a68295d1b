"""Vector passes over one row of scores.

A row is copied to the thread's scratch memory, where it stays in the core's own cache, and padded
with minus infinity to whole groups of GROUP_VECTORS vectors. A column is one lane of a group:

    group 0   | v0  |   a column is lane 0 of v0, v1, ... v15;
              | v1  |   its maximum tells whether any of its 16 scores can matter,
              | ... |   so most columns are never read in a search for few scores
              | v15 |
    group 1   | ... |

The weight of a score is exp(score - largest), or 0 below a threshold. Kernels take integers only,
so float32 arguments are passed as their bits (scalar.py's float_to_bits).
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS
from nanovllm.model.kernels.simd.scalar import F64, ordered_bits
from nanovllm.model.kernels.simd.vector import F32, I32, I64, Value, Vectors, kernel

MAX_DISTANCE = 87.0
"""Scores further below the largest weigh nothing: exp(-87) is 1e-38, and a draw has 53 bits."""
LOWEST = -3.4028234663852886e38
"""The lowest finite float32."""
_INFINITY = float("inf")


def _splat_bits(v: Vectors, bits: Value) -> Value:
    """Broadcast a float32 argument, passed as its bits, to every lane."""
    return v.splat(v.builder.bitcast(v.builder.trunc(bits, I32), F32))


def _weight(v: Vectors, score: Value, least: Value, largest: Value) -> Value:
    """Return exp(score - largest), or 0 where the score is below `least`."""
    return v.where(
        v.builder.fcmp_ordered(">=", score, least),
        v.exp(v.subtract(score, largest)),
        v.constant(0.0),
    )


def make_fill(target: KernelTarget) -> Any:
    """Make fill(out, count, bits): set `count` float32, rounded up to vectors, to one value."""

    def fill(v: Vectors, out: Value, count: Value, bits: Value) -> None:
        value = _splat_bits(v, bits)

        def store(i: Value, _: list[Value]) -> list[Value]:
            v.store(value, v.element(out, i))
            return []

        v.loop(count, v.lanes, [], store)

    return kernel(target, fill)


def make_scale(target: KernelTarget) -> Any:
    """Make scale(source, out, count, padded, temperature): out = source / temperature.

    NaN becomes infinity, so that the largest score shows both. A finite score that would overflow
    stays finite, and -0.0 becomes 0.0.

    Arguments of scale:
        source: address of exactly `count` float32.
        out: address of `padded` float32, minus infinity from `count` on; may be `source`.
        count: number of scores.
        padded: `count` rounded up to whole groups.
        temperature: divisor, as bits.
    """
    lanes = target.lanes

    def scale(
        v: Vectors, source: Value, out: Value, count: Value, padded: Value, temperature: Value
    ) -> None:
        divisor = _splat_bits(v, temperature)
        whole = v.builder.and_(count, I64(-lanes))
        rest = v.builder.sub(count, whole)

        def scaled(x: Value) -> Value:
            finite = v.minimum(v.add(v.divide(x, divisor), v.constant(0.0)), v.constant(-LOWEST))
            is_below_infinity = v.builder.fcmp_ordered("<", x, v.constant(_INFINITY))
            return v.where(is_below_infinity, finite, v.constant(_INFINITY))

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(scaled(v.load(v.element(source, i))), v.element(out, i))
            return []

        def copy(i: Value, _: list[Value]) -> list[Value]:
            index = v.builder.add(whole, i)
            v.store(v.load_scalar(v.element(source, index)), v.element(out, index))
            return []

        def finish(i: Value, _: list[Value]) -> list[Value]:
            address = v.element(out, v.builder.add(whole, i))
            inside = v.first_lanes(v.builder.sub(rest, i))
            v.store(v.where(inside, scaled(v.load(address)), v.constant(-_INFINITY)), address)
            return []

        v.loop(whole, lanes, [], vector)
        v.loop(rest, 1, [], copy)
        v.loop(v.builder.sub(padded, whole), lanes, [], finish)

    return kernel(target, scale)


def make_maxima(target: KernelTarget) -> Any:
    """Make maxima(scores, groups, maxima) -> the largest score.

    It writes the maximum of each column to `maxima`, `lanes` of them a group.
    """
    lanes = target.lanes

    def maxima(v: Vectors, scores: Value, groups: Value, maxima: Value) -> Value:
        def group(g: Value, best: list[Value]) -> list[Value]:
            start = v.element(scores, v.times(g, GROUP_VECTORS * lanes))
            highest = v.load(start)
            for vector in range(1, GROUP_VECTORS):
                highest = v.maximum(v.load(start, vector * lanes * WORD_BYTES), highest)
            v.store(highest, v.element(maxima, v.times(g, lanes)))
            return [v.maximum(highest, best[0])]

        return v.largest(v.loop(groups, 1, [v.constant(-_INFINITY)], group)[0])

    return kernel(target, maxima, returns=types.float32)


def make_weigh_groups(target: KernelTarget) -> Any:
    """Make weigh_groups(scores, groups, least, largest, sums) -> the sum of all weights, in
    float64.

    It writes the sum of each group to `sums`, a float64. Lanes are summed in float64, one group
    after the other. `least` and `largest` are bits.
    """
    lanes = target.lanes

    def weigh_groups(
        v: Vectors, scores: Value, groups: Value, least: Value, largest: Value, sums: Value
    ) -> Value:
        least, largest = _splat_bits(v, least), _splat_bits(v, largest)
        doubles = ir.VectorType(F64, lanes)

        def group(g: Value, total: list[Value]) -> list[Value]:
            start = v.element(scores, v.times(g, GROUP_VECTORS * lanes))

            def vector(i: Value, subtotal: list[Value]) -> list[Value]:
                weight = _weight(v, v.load(v.element(start, i)), least, largest)
                return [v.add(subtotal[0], v.builder.fpext(weight, doubles))]

            zeros = ir.Constant(doubles, [ir.Constant(F64, 0.0)] * lanes)
            subtotal = v.sum(v.loop(I64(GROUP_VECTORS * lanes), lanes, [zeros], vector)[0])
            v.store(subtotal, v.address(sums, v.times(g, 8)))
            return [v.add(total[0], subtotal)]

        return v.loop(groups, 1, [ir.Constant(F64, 0.0)], group)[0]

    return kernel(target, weigh_groups, returns=types.float64)


def make_weigh(target: KernelTarget) -> Any:
    """Make weigh(scores, count, least, largest, weights): the weight of each score.

    `count` is rounded up to whole vectors; `least` and `largest` are bits.
    """
    lanes = target.lanes

    def weigh(
        v: Vectors, scores: Value, count: Value, least: Value, largest: Value, weights: Value
    ) -> None:
        least, largest = _splat_bits(v, least), _splat_bits(v, largest)

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(_weight(v, v.load(v.element(scores, i)), least, largest), v.element(weights, i))
            return []

        v.loop(count, lanes, [], vector)

    return kernel(target, weigh)


def make_weigh_keys(target: KernelTarget) -> Any:
    """Make weigh_keys(keys, count, largest, weights): the weights of scores given as int32 keys.

    `count` is rounded up to whole vectors; `largest` is bits.
    """
    lanes = target.lanes

    def weigh_keys(v: Vectors, keys: Value, count: Value, largest: Value, weights: Value) -> None:
        largest = _splat_bits(v, largest)

        def vector(i: Value, _: list[Value]) -> list[Value]:
            key = v.builder.bitcast(v.load(v.element(keys, i)), v.i32s)
            score = v.builder.bitcast(ordered_bits(v.builder, key, v.integers), v.f32s)
            v.store(v.exp(v.subtract(score, largest)), v.element(weights, i))
            return []

        v.loop(count, lanes, [], vector)

    return kernel(target, weigh_keys)


def make_rank(target: KernelTarget) -> Any:
    """Make rank(scores, padded, token, score) -> the number of tokens that rank before `token`.

    A token ranks before another if its score is larger, or equal and its id lower. `score` is that
    of `token`, as bits.
    """
    lanes = target.lanes

    def rank(v: Vectors, scores: Value, padded: Value, token: Value, score: Value) -> Value:
        own_score = _splat_bits(v, score)

        def vector(i: Value, count: list[Value]) -> list[Value]:
            score = v.load(v.element(scores, i))
            tied = v.builder.and_(
                v.builder.fcmp_ordered("==", score, own_score),
                v.first_lanes(v.builder.sub(token, i)),
            )
            ahead = v.builder.or_(v.builder.fcmp_ordered(">", score, own_score), tied)
            return [v.builder.add(count[0], v.builder.zext(ahead, v.i32s))]

        counts = v.loop(padded, lanes, [v.integers(0)], vector)[0]
        total = I64(0)
        for lane in range(lanes):
            lane_count = v.builder.extract_element(counts, I32(lane))
            total = v.builder.add(total, v.builder.zext(lane_count, I64))
        return total

    return kernel(target, rank, returns=types.intp)
