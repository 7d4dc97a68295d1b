"""Conversion of float32 rows to the types that linear layers and the KV cache take.

    bfloat16       the upper half of a float32, rounded to nearest even
    int8 inputs    round(x / scale) + zero_point, 0 to 255: asymmetric, over the row's range; int16
                   where x86 has no dot products of bytes (KernelTarget.input_type)
    int8 in cache  round(x / scale), -127 to 127: symmetric, over the row's largest magnitude

Scale and zero point belong to one row, so a row's bytes do not depend on the rows beside it. Inputs
are unsigned because x86 dot products multiply unsigned by signed bytes. For those of ARM, inputs
and zero point are smaller by 128 (KernelTarget.int8_offset). The outliers, a few input channels
that are always large, are taken out of the row and stay float32; nanovllm/model/quantization.py
chooses them once. The quantization of a row, its row_quant, is 32 words:

    scale (float32) | zero point (int32) | 14 unused | up to 16 outliers (float32)

A row with a NaN or an infinity gets the scale NaN, because a byte cannot represent either.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.elements import Elements, for_elements
from nanovllm.model.kernels.simd.kernel import Record, kernel, kernel_maker
from nanovllm.model.kernels.simd.memory import make_clear, make_copy
from nanovllm.model.kernels.simd.value import I8, I16, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import ROW_QUANT_OUTLIERS

_MIN_MAGNITUDE = 1e-30  # keeps the scale of a row of zeros above 0


@kernel_maker()
def make_round_row(v: Vectors, source_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Return round_row(source_ptr, out_ptr, count): exactly `count` float32 to bfloat16."""

    def convert(elements: Elements) -> None:
        rounded = v.round_bfloat16(elements.load(source_ptr))
        elements.store(rounded, out_ptr, element_bytes=2)

    for_elements(v, count, convert)


@kernel_maker()
def make_widen_row(v: Vectors, source_ptr: Value, out_ptr: Value, count: Value) -> None:
    """Return widen_row(source_ptr, out_ptr, count): bfloat16 to float32, in whole vectors."""
    with v.range(count, v.lanes) as i:
        codes = v.load_codes(source_ptr + i * 2, I16)
        v.store(codes << 16, v.element(out_ptr, i))


@kernel_maker()
def make_quantize_row(
    v: Vectors, source_ptr: Value, factors_ptr: Value, out_ptr: Value, row_quant_ptr: Value,
    count: Value,
) -> None:  # fmt: skip
    """Return quantize_row, which converts source * factors to numbers from 0 to 255.

    They and the zero point are stored less KernelTarget.int8_offset.

    source_ptr     float32 [count]
    factors_ptr    float32 [count]
    out_ptr        bytes [count]; or int16 [count] in the order 0, 2, 1, 3 of each four
    row_quant_ptr  receives scale and zero point
    count          numbers in the row

    Whole vectors are read and written. Padding does not count for the range.
    """

    def value(i: Value) -> Value:
        return v.load(v.element(source_ptr, i)) * v.load(v.element(factors_ptr, i))

    def find_range(i: Value, carried: list[Value]) -> list[Value]:
        inside = v.where(v.first_lanes(count - i), value(i), 0.0)
        return [
            v.minimum(inside, carried[0]),
            v.maximum(inside, carried[1]),
            v.fma(inside, 0.0, carried[2]),
        ]

    zeros = v.constant(0.0)
    smallest, largest, zero_or_nan = v.loop(count, v.lanes, [zeros, zeros, zeros], find_range)
    low, high = v.smallest(smallest), v.largest(largest)
    extent = high - low
    is_flat = extent == 0.0
    inverse = v.where(is_flat, 0.0, 255.0 / extent)
    zero_point = v.round_int32(v.splat(-(low * inverse)))
    scale = extent / 255.0 + v.sum(zero_or_nan)
    v.store(scale, row_quant_ptr)
    offset = v.target.int8_offset
    v.store(zero_point.lane(0) - offset, row_quant_ptr, WORD_BYTES)
    with v.range(count, v.lanes) as i:
        code = v.round_int32(value(i) * v.splat(inverse)) + zero_point
        code = v.minimum(v.maximum(code, 0), 255)
        if v.target.input_type("int8") == "int16":
            order = [lane ^ 3 if lane % 4 in (1, 2) else lane for lane in range(v.lanes)]
            v.store(v.shuffle(code, code, order).trunc(I16), out_ptr + i * 2)
        else:
            v.store((code - offset).trunc(I8), out_ptr + i)


@kernel_maker()
def _make_extract_outliers(
    v: Vectors, source_ptr: Value, linear: Record, row_quant_ptr: Value
) -> None:
    """Return extract_outliers(source_ptr, linear, row_quant_ptr).

    It copies the outliers of a float32 row, times their factors, to the row's quantization.
    """
    outliers_ptr = row_quant_ptr + ROW_QUANT_OUTLIERS * WORD_BYTES

    with v.range(linear.outliers) as i:
        column = v.load_word(v.element(linear.outlier_columns_ptr, i)).zext(I64)
        value = v.load_scalar(v.element(source_ptr, column))
        factor = v.load_scalar(v.element(linear.outlier_factors_ptr, i))
        v.store(value * factor, v.element(outliers_ptr, i))


@kernel_maker()
def make_quantize_signed(
    v: Vectors, source_ptr: Value, out_ptr: Value, scale_ptr: Value, count: Value
) -> None:
    """Return quantize_signed(source_ptr, out_ptr, scale_ptr, count): float32 to signed bytes.

    `scale_ptr` receives the row's float32 scale. Whole vectors are read and written; padding is 0.
    """

    def value(i: Value) -> Value:
        is_inside = v.first_lanes(count - i)
        return v.where(is_inside, v.load(v.element(source_ptr, i)), 0.0)

    def find_largest(i: Value, carried: list[Value]) -> list[Value]:
        return [
            v.maximum(v.magnitude(value(i)), carried[0]),
            v.fma(value(i), 0.0, carried[1]),
        ]

    magnitudes, zero_or_nan = v.loop(
        count, v.lanes, [v.constant(_MIN_MAGNITUDE), v.constant(0.0)], find_largest
    )
    largest = v.largest(magnitudes)
    scale = largest * (1 / 127) + v.sum(zero_or_nan)
    v.store(scale, scale_ptr)
    inverse = v.splat(127.0 / largest)
    with v.range(count, v.lanes) as i:
        code = v.round_int32(value(i) * inverse)
        v.store(code.trunc(I8), out_ptr + i)


def make_convert_row(target: KernelTarget, weights: str) -> Any:
    """Return convert_row, which converts a float32 row to a linear layer's bfloat16 or int8 input.

    source_ptr     float32 [count]
    count          numbers in the row
    linear         record of the linear layer
    out_ptr        the input row
    row_quant_ptr  its quantization, where the weights are int8

    Outliers have the input factor 0, so their bytes in the row stand for 0.
    """
    round_row, quantize_row = make_round_row(target), make_quantize_row(target)
    extract_outliers = _make_extract_outliers(target)
    is_bfloat16 = weights == "bfloat16"

    @compiled
    def convert_row(
        source_ptr: int, count: int, linear: Any, out_ptr: int, row_quant_ptr: int
    ) -> None:
        if is_bfloat16:
            round_row(source_ptr, out_ptr, count)
        else:
            extract_outliers(source_ptr, linear, row_quant_ptr)
            quantize_row(source_ptr, linear.input_factors_ptr, out_ptr, row_quant_ptr, count)

    return convert_row


def make_convert_kv(target: KernelTarget, cache: str) -> Any:
    """Return convert_kv, which converts one head's key or value to the type of the cache.

    source_ptr  float32 [count]; nothing behind it is read
    count       numbers in the row
    out_ptr     the row in the cache's type, zeros to the next whole vector of float32
    scale_ptr   receives the float32 scale, where the cache is int8
    """
    copy, clear = make_copy(target), make_clear(target)
    round_row, quantize_signed = make_round_row(target), make_quantize_signed(target)

    @compiled
    def convert_kv(source_ptr: int, count: int, out_ptr: int, scale_ptr: int) -> None:
        clear(out_ptr, count)
        if cache == "bfloat16":
            round_row(source_ptr, out_ptr, count)
        else:
            copy(source_ptr, out_ptr, count)
        if cache == "int8":
            # In place: whole vectors of the source could reach behind the last token's row. The
            # bytes written never overtake the floats that are still to be read.
            quantize_signed(out_ptr, out_ptr, scale_ptr, count)

    return convert_kv


def make_pack_value_row(target: KernelTarget, per_word: int) -> Any:
    """Return pack_value_row, which writes a row of numbers into one position of 32-bit words.

    codes_ptr  the row, in numbers of 32 / per_word bits
    words_ptr  the words
    position   position in each word; 0 clears the other positions
    columns    numbers in the row; whole vectors are written

    Positions are written in ascending order, so a word never mixes new numbers with old ones.
    """
    bits = 32 // per_word
    code_type = {1: I32, 2: I16, 4: I8}[per_word]

    def pack_value_row(
        v: Vectors, codes_ptr: Value, words_ptr: Value, position: Value, columns: Value
    ) -> None:
        shift = v.splat((position * bits).trunc(I32))
        code_mask = v.integers(-1 if per_word == 1 else (1 << bits) - 1)
        others = ~(code_mask << shift)
        is_first = position == 0
        keep = v.where(is_first, 0, others)

        with v.range(columns, v.lanes) as i:
            word_ptr = v.element(words_ptr, i)
            codes = v.load_codes(codes_ptr + i * (bits // 8), code_type)
            kept = v.load_words(word_ptr) & keep
            v.store(kept | (codes << shift), word_ptr)

    return kernel(target, pack_value_row)
