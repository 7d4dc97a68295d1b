"""Rows of float32 in the types that products and the cache take them in.

    bfloat16          the upper half of a float32, rounded to the nearest
    inputs as bytes   round(x / scale) + zero_point, 0 to 255, so that the row's smallest and largest number just fit
    cache as bytes    round(x / scale), -127 to 127, so that its largest magnitude just fits

Scale and zero point belong to one row alone, so a row's bytes do not depend on the rows beside it. Inputs are unsigned because the dot
product of this processor takes one unsigned and one signed side. A few inputs that are always large (nanovllm/model/quantization.py chooses them
once) are taken out of the row and kept in float32 beside it. What is known of a row of bytes:

    notes   scale | zero point | 14 unused | up to 16 outliers          32 words, a float32 each but the zero point, which is an int32
"""

from typing import Any

from llvmlite import ir

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.move import make_clear, make_copy
from nanovllm.model.kernels.simd.vector import F32, I8, I16, I32, I64, Value, Vectors, kernel
from nanovllm.model.kernels.step_record import OUTLIER_NOTES

_TINIEST = 1e-30  # instead of a row of zeros' own scale


def make_round_row(target: KernelTarget) -> Any:
    """round_row(source, out, count): exactly `count` float32 as bfloat16 in a row."""

    def round_row(v: Vectors, source: Value, out: Value, count: Value) -> None:
        whole = v.builder.and_(count, I64(-v.lanes))

        def vectors(i: Value, _: list[Value]) -> list[Value]:
            v.store(v.round_bfloat16(v.load(v.element(source, i))), v.address(out, v.times(i, 2)))
            return []

        def rest(i: Value, _: list[Value]) -> list[Value]:
            place = v.builder.add(whole, i)
            rounded = v.round_bfloat16(v.splat(v.load_scalar(v.element(source, place))))
            v.store(v.builder.extract_element(rounded, I32(0)), v.address(out, v.times(place, 2)))
            return []

        v.loop(whole, v.lanes, [], vectors)
        v.loop(v.builder.sub(count, whole), 1, [], rest)

    return kernel(target, round_row)


def make_widen_row(target: KernelTarget) -> Any:
    """widen_row(source, out, count): bfloat16 to float32, whole vectors, at least `count` of them."""

    def widen_row(v: Vectors, source: Value, out: Value, count: Value) -> None:
        def vector(i: Value, _: list[Value]) -> list[Value]:
            words = v.builder.shl(
                v.load_codes(v.address(source, v.times(i, 2)), I16), v.integers(16)
            )
            v.store(words, v.element(out, i))
            return []

        v.loop(count, v.lanes, [], vector)

    return kernel(target, widen_row)


def make_quantize_row(target: KernelTarget) -> Any:
    """quantize_row(source, factors, out, notes, count): source * factors as unsigned bytes, and scale and zero point into the notes.

    Whole vectors are read and written; from `count` on they do not count for the range.
    """

    def quantize_row(
        v: Vectors, source: Value, factors: Value, out: Value, notes: Value, count: Value
    ) -> None:
        def value(i: Value) -> Value:
            return v.multiply(v.load(v.element(source, i)), v.load(v.element(factors, i)))

        def find_range(i: Value, carried: list[Value]) -> list[Value]:
            inside = v.where(v.first_lanes(v.builder.sub(count, i)), value(i), v.constant(0.0))
            return [
                v.minimum(inside, carried[0]),
                v.maximum(inside, carried[1]),
                v.fma(inside, v.constant(0.0), carried[2]),
            ]

        def convert(i: Value, _: list[Value]) -> list[Value]:
            code = v.builder.add(v.round_int32(v.multiply(value(i), v.splat(inverse))), zero_point)
            code = v.clamp_integers(code, 0, 255)
            v.store(v.builder.trunc(code, ir.VectorType(I8, v.lanes)), v.address(out, i))
            return []

        zeros = v.constant(0.0)
        smallest, largest, nothing = v.loop(count, v.lanes, [zeros, zeros, zeros], find_range)
        low, high = v.smallest(smallest), v.largest(largest)
        extent = v.builder.fsub(high, low)
        is_flat = v.builder.fcmp_ordered("==", extent, F32(0.0))
        inverse = v.builder.select(is_flat, F32(0.0), v.builder.fdiv(F32(255.0), extent))
        zero_point = v.round_int32(v.splat(v.builder.fneg(v.builder.fmul(low, inverse))))
        # A row with a NaN or an infinity gets NaN for its scale, since a byte could not tell.
        v.store(v.builder.fadd(v.builder.fdiv(extent, F32(255.0)), v.sum(nothing)), notes)
        v.store(v.builder.extract_element(zero_point, I32(0)), notes, F32_BYTES)
        v.loop(count, v.lanes, [], convert)

    return kernel(target, quantize_row)


def make_take_outliers(target: KernelTarget) -> Any:
    """take_outliers(source, factors, places, count, notes): the numbers at `count` places times `count` factors into the notes."""

    def take_outliers(
        v: Vectors, source: Value, factors: Value, places: Value, count: Value, notes: Value
    ) -> None:
        def take(i: Value, _: list[Value]) -> list[Value]:
            place = v.builder.zext(v.load_word(v.element(places, i)), I64)
            outlier = v.builder.fmul(
                v.load_scalar(v.element(source, place)), v.load_scalar(v.element(factors, i))
            )
            v.store(outlier, v.element(v.address(notes, OUTLIER_NOTES * F32_BYTES), i))
            return []

        v.loop(count, 1, [], take)

    return kernel(target, take_outliers)


def make_quantize_signed(target: KernelTarget) -> Any:
    """quantize_signed(source, out, scale, count): signed bytes, and the row's scale; whole vectors are read and written, zeros from `count` on."""

    def quantize_signed(v: Vectors, source: Value, out: Value, scale: Value, count: Value) -> None:
        def value(i: Value) -> Value:
            return v.where(
                v.first_lanes(v.builder.sub(count, i)),
                v.load(v.element(source, i)),
                v.constant(0.0),
            )

        def find_largest(i: Value, carried: list[Value]) -> list[Value]:
            return [
                v.maximum(v.magnitude(value(i)), carried[0]),
                v.fma(value(i), v.constant(0.0), carried[1]),
            ]

        def convert(i: Value, _: list[Value]) -> list[Value]:
            code = v.round_int32(v.multiply(value(i), inverse))
            v.store(v.builder.trunc(code, ir.VectorType(I8, v.lanes)), v.address(out, i))
            return []

        most, nothing = v.loop(
            count, v.lanes, [v.constant(_TINIEST), v.constant(0.0)], find_largest
        )
        largest = v.largest(most)
        v.store(v.builder.fadd(v.builder.fmul(largest, F32(1 / 127)), v.sum(nothing)), scale)
        inverse = v.splat(v.builder.fdiv(F32(127.0), largest))
        v.loop(count, v.lanes, [], convert)

    return kernel(target, quantize_signed)


def make_encode_input(target: KernelTarget, weights: str) -> Any:
    """encode_input(source, count, linear, out, notes): a row of float32 as a product by `linear` takes it.

    The input factors of outliers are 0, so that they are zeros in the row of bytes.
    """
    round_row, quantize_row, take_outliers = (
        make_round_row(target),
        make_quantize_row(target),
        make_take_outliers(target),
    )
    narrow = weights == "bfloat16"

    @compiled
    def encode_input(source: int, count: int, linear: Any, out: int, notes: int) -> None:
        if narrow:
            round_row(source, out, count)
        else:
            take_outliers(
                source, linear.outlier_factors, linear.outlier_places, linear.outliers, notes
            )
            quantize_row(source, linear.input_factors, out, notes, count)

    return encode_input


def make_encode_token(target: KernelTarget, cache: str) -> Any:
    """encode_token(source, count, out, scale): a key or value of one head as the cache holds it, in a row, zeros to the next whole vector.

    Exactly `count` float32 are read; `out` has room for whole vectors of float32.
    """
    copy, clear, round_row, quantize = (
        make_copy(target),
        make_clear(target),
        make_round_row(target),
        make_quantize_signed(target),
    )

    @compiled
    def encode_token(source: int, count: int, out: int, scale: int) -> None:
        clear(out, count)
        if cache == "bfloat16":
            round_row(source, out, count)
        else:
            copy(source, out, count)
        if (
            cache == "int8"
        ):  # in place, since whole vectors read from the source could lead out of the last token's row; bytes never overtake
            quantize(out, out, scale, count)

    return encode_token


def make_insert(target: KernelTarget, per_word: int) -> Any:
    """insert(codes, words, place, columns): a row of numbers into place `place` of each word; place 0 clears the others.

    Whole vectors, at least `columns` of them. A word is filled from place 0 on, so what was there before is never mixed with what is new.
    """
    bits = 32 // per_word
    element = {1: I32, 2: I16, 4: I8}[per_word]

    def insert(v: Vectors, codes: Value, words: Value, place: Value, columns: Value) -> None:
        shift = v.splat(v.builder.trunc(v.builder.mul(place, I64(bits)), I32))
        others = v.builder.not_(
            v.builder.shl(v.integers(-1 if per_word == 1 else (1 << bits) - 1), shift)
        )
        keep = v.builder.select(v.builder.icmp_signed("==", place, I64(0)), v.integers(0), others)

        def vector(i: Value, _: list[Value]) -> list[Value]:
            at = v.element(words, i)
            new = v.builder.shl(
                v.load_codes(v.address(codes, v.times(i, bits // 8)), element), shift
            )
            v.store(v.builder.or_(v.builder.and_(v.load_words(at), keep), new), at)
            return []

        v.loop(columns, v.lanes, [], vector)

    return kernel(target, insert)
