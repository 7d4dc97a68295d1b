"""Passes over one row of scores, all vectors wide: what sampling and reports need to know about a row.

A row is copied into memory of the thread's own, filled up with minus infinity to whole groups of GROUP_VECTORS vectors, and stays in a
core's own cache. The maxima are those of columns, one lane of a group:

    group 0   | v0  |   a column is lane 0 of v0, v1, ... v15
              | v1  |   its maximum says whether any of its 16 scores can matter:
              | ... |   looking for few scores among many, most columns are never opened
              | v15 |
    group 1   | ... |

Numbers are handed over as bits, since kernels take integers only.
"""

from typing import Any

from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.sampling.record import GROUP_VECTORS
from nanovllm.model.kernels.simd.scalar import F64, ordered_bits
from nanovllm.model.kernels.simd.vector import F32, I32, I64, Value, Vectors, kernel

FARTHEST = 87.0
"""Scores so far below the largest weigh nothing: e to the -87 is 1e-38, and a draw has 53 bits."""
LOWEST = -3.4028234663852886e38
"""The least float32 that is finite."""
_INFINITY = float("inf")


def _number(v: Vectors, bits: Value) -> Value:
    """A float32 in every lane, from its bits."""
    return v.splat(v.builder.bitcast(v.builder.trunc(bits, I32), F32))


def _weight(v: Vectors, score: Value, least: Value, largest: Value) -> Value:
    """e to the (score - largest); 0 for a score below `least`."""
    return v.where(
        v.builder.fcmp_ordered(">=", score, least),
        v.exp(v.subtract(score, largest)),
        v.constant(0.0),
    )


def make_fill(target: KernelTarget) -> Any:
    """fill(target, count, bits): whole vectors of one number, at least `count` float32."""

    def fill(v: Vectors, target: Value, count: Value, bits: Value) -> None:
        number = _number(v, bits)

        def store(i: Value, _: list[Value]) -> list[Value]:
            v.store(number, v.element(target, i))
            return []

        v.loop(count, v.lanes, [], store)

    return kernel(target, fill)


def make_scale(target: KernelTarget) -> Any:
    """scale(source, target, count, padded, temperature): target = source / temperature, for exactly `count` float32; may be in place.

    From `count` to `padded` the target gets minus infinity. NaN becomes infinity, so that the largest score tells of both; a sound score
    that would overflow stays finite, and -0.0 becomes 0.0.
    """
    lanes = target.lanes

    def scale(
        v: Vectors, source: Value, target: Value, count: Value, padded: Value, temperature: Value
    ) -> None:
        divisor = _number(v, temperature)
        whole = v.builder.and_(count, I64(-lanes))
        rest = v.builder.sub(count, whole)

        def scaled(x: Value) -> Value:
            finite = v.minimum(v.add(v.divide(x, divisor), v.constant(0.0)), v.constant(-LOWEST))
            return v.where(
                v.builder.fcmp_ordered("<", x, v.constant(_INFINITY)), finite, v.constant(_INFINITY)
            )

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(scaled(v.load(v.element(source, i))), v.element(target, i))
            return []

        def copy(i: Value, _: list[Value]) -> list[Value]:
            place = v.builder.add(whole, i)
            v.store(v.load_scalar(v.element(source, place)), v.element(target, place))
            return []

        def finish(i: Value, _: list[Value]) -> list[Value]:
            at = v.element(target, v.builder.add(whole, i))
            v.store(
                v.where(
                    v.first_lanes(v.builder.sub(rest, i)),
                    scaled(v.load(at)),
                    v.constant(-_INFINITY),
                ),
                at,
            )
            return []

        v.loop(whole, lanes, [], vector)
        v.loop(rest, 1, [], copy)
        v.loop(v.builder.sub(padded, whole), lanes, [], finish)

    return kernel(target, scale)


def make_maxima(target: KernelTarget) -> Any:
    """maxima(scores, groups, maxima) -> the largest score; writes one maximum a column, `lanes` of them a group."""
    lanes = target.lanes

    def maxima(v: Vectors, scores: Value, groups: Value, maxima: Value) -> Value:
        def group(g: Value, best: list[Value]) -> list[Value]:
            start = v.element(scores, v.times(g, GROUP_VECTORS * lanes))
            highest = v.load(start)
            for vector in range(1, GROUP_VECTORS):
                highest = v.maximum(v.load(start, vector * lanes * F32_BYTES), highest)
            v.store(highest, v.element(maxima, v.times(g, lanes)))
            return [v.maximum(highest, best[0])]

        return v.largest(v.loop(groups, 1, [v.constant(-_INFINITY)], group)[0])

    return kernel(target, maxima, returns=types.float32)


def make_weigh_groups(target: KernelTarget) -> Any:
    """weigh_groups(scores, groups, least, largest, sums) -> the sum of all weights; writes that of each group, a float64.

    The weight of a score is e to the (score - largest), and 0 for one below `least`. Lanes are added up in float64, group after group.
    """
    lanes = target.lanes

    def weigh_groups(
        v: Vectors, scores: Value, groups: Value, least: Value, largest: Value, sums: Value
    ) -> Value:
        least, largest = _number(v, least), _number(v, largest)
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
    """weigh(scores, count, least, largest, weights): the weight of each score, whole vectors."""
    lanes = target.lanes

    def weigh(
        v: Vectors, scores: Value, count: Value, least: Value, largest: Value, weights: Value
    ) -> None:
        least, largest = _number(v, least), _number(v, largest)

        def vector(i: Value, _: list[Value]) -> list[Value]:
            v.store(_weight(v, v.load(v.element(scores, i)), least, largest), v.element(weights, i))
            return []

        v.loop(count, lanes, [], vector)

    return kernel(target, weigh)


def make_weigh_keys(target: KernelTarget) -> Any:
    """weigh_keys(keys, count, largest, weights): the weight of each score whose ordered key is given, whole vectors."""
    lanes = target.lanes

    def weigh_keys(v: Vectors, keys: Value, count: Value, largest: Value, weights: Value) -> None:
        largest = _number(v, largest)

        def vector(i: Value, _: list[Value]) -> list[Value]:
            bits = ordered_bits(
                v.builder, v.builder.bitcast(v.load(v.element(keys, i)), v.i32s), v.integers
            )
            v.store(
                v.exp(v.subtract(v.builder.bitcast(bits, v.f32s), largest)), v.element(weights, i)
            )
            return []

        v.loop(count, lanes, [], vector)

    return kernel(target, weigh_keys)


def make_rank(target: KernelTarget) -> Any:
    """rank(scores, padded, token, own) -> how many scores stand before that of `token`, which is `own`; of equals the lower id."""
    lanes = target.lanes

    def rank(v: Vectors, scores: Value, padded: Value, token: Value, own: Value) -> Value:
        own = _number(v, own)

        def vector(i: Value, count: list[Value]) -> list[Value]:
            score = v.load(v.element(scores, i))
            tied = v.builder.and_(
                v.builder.fcmp_ordered("==", score, own), v.first_lanes(v.builder.sub(token, i))
            )
            ahead = v.builder.or_(v.builder.fcmp_ordered(">", score, own), tied)
            return [v.builder.add(count[0], v.builder.zext(ahead, v.i32s))]

        counts = v.loop(padded, lanes, [v.integers(0)], vector)[0]
        total = I64(0)
        for lane in range(lanes):
            total = v.builder.add(
                total, v.builder.zext(v.builder.extract_element(counts, I32(lane)), I64)
            )
        return total

    return kernel(target, rank, returns=types.intp)
