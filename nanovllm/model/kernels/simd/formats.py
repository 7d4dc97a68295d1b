"""How numbers are stored in panels, and how a tile multiplies by them.

A step of a panel is one word of 32 bits a column, whatever the type: one float32, two bfloat16 or four int8, that stand below each other
in the matrix. So every type has the same layout, and the same tile walks down it; only the multiply-add differs.

    matrix [d_in, d_out]  ->  panels [d_out / width][d_in / per_word][width][per_word]

A `Format` says what happens at a step: `widen` turns a vector of words into operands once for all rows of the tile, `inputs` makes the
operands of one row, and `multiply_add` takes them pair by pair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.vector import Value, Vectors


@dataclass(frozen=True, slots=True)
class Format:
    """Numbers of one type in panels.

    Attributes:
        per_word: numbers in a word of 32 bits, one below the other.
        input_bytes: bytes of one row of inputs that a step takes.
        accumulates_int32: whether sums are 32-bit integers; otherwise they are float32.
        widen: (v, words) to operands. inputs: (v, address) to as many operands. multiply_add: (v, input, weight, sum) to the new sum.
    """

    per_word: int
    input_bytes: int
    accumulates_int32: bool
    widen: Callable[[Vectors, Value], Sequence[Value]]
    inputs: Callable[[Vectors, Value], Sequence[Value]]
    multiply_add: Callable[[Vectors, Value, Value, Value], Value]


def weight_format(target: KernelTarget, kind: str) -> Format:
    """Weights of type `kind` times inputs of the same type: float32, pairs of bfloat16, or bytes (unsigned inputs, signed weights)."""
    if kind == "float32":
        return _float32()
    if kind == "bfloat16":
        return _bfloat16_dot() if target.bfloat16_dot else _bfloat16_widened()
    if target.int8_dot:
        return _int8_dot()
    return _int8_by_int16() if target.is_x86 else _int8_by_int32()


def cache_format(target: KernelTarget, kind: str) -> Format:
    """Keys or values of type `kind` times queries or weights: bfloat16 with its own kind, int8 widened and times float32."""
    if kind == "int8":
        return _int8_widened()
    return weight_format(target, kind)


def _float32() -> Format:
    return Format(
        per_word=1,
        input_bytes=F32_BYTES,
        accumulates_int32=False,
        widen=lambda v, words: [v.builder.bitcast(words, v.f32s)],
        inputs=lambda v, at: [v.splat(v.load_scalar(at))],
        multiply_add=lambda v, a, w, total: v.fma(a, w, total),
    )


def _bfloat16_dot() -> Format:
    return _dot(2, lambda v, a, w, total: v.dot_bfloat16(a, w, total), accumulates_int32=False)


def _int8_dot() -> Format:
    return _dot(4, lambda v, a, w, total: v.dot_int8(a, w, total), accumulates_int32=True)


def _dot(
    per_word: int,
    multiply_add: Callable[[Vectors, Value, Value, Value], Value],
    *,
    accumulates_int32: bool,
) -> Format:
    """Words as they are, for a processor that multiplies and adds what is in them."""
    return Format(
        per_word=per_word,
        input_bytes=4,
        accumulates_int32=accumulates_int32,
        widen=lambda v, words: [words],
        inputs=lambda v, at: [v.splat(v.load_word(at))],
        multiply_add=multiply_add,
    )


def _bfloat16_widened() -> Format:
    return Format(
        per_word=2,
        input_bytes=4,
        accumulates_int32=False,
        widen=lambda v, words: v.widen_bfloat16(words),
        inputs=lambda v, at: [v.splat(half) for half in v.widen_bfloat16(v.load_word(at))],
        multiply_add=lambda v, a, w, total: v.fma(a, w, total),
    )


def _int8_by_int16() -> Format:
    """Bytes 0 and 2 of each word as two int16, then bytes 1 and 3: sums of two products of int16 are exact in 32 bits."""
    return Format(
        per_word=4,
        input_bytes=4,
        accumulates_int32=True,
        widen=lambda v, words: v.signed_halves(words),
        inputs=lambda v, at: v.unsigned_halves(v.splat(v.load_word(at))),
        multiply_add=lambda v, a, w, total: v.dot_int16(a, w, total),
    )


def _int8_by_int32() -> Format:
    return Format(
        per_word=4,
        input_bytes=4,
        accumulates_int32=True,
        widen=lambda v, words: v.signed_bytes(words),
        inputs=lambda v, at: v.unsigned_bytes(v.splat(v.load_word(at))),
        multiply_add=lambda v, a, w, total: v.builder.add(total, v.builder.mul(a, w)),
    )


def _int8_widened() -> Format:
    return Format(
        per_word=4,
        input_bytes=4 * F32_BYTES,
        accumulates_int32=False,
        widen=lambda v, words: [v.to_float(byte) for byte in v.signed_bytes(words)],
        inputs=lambda v, at: [v.splat(v.load_scalar(at, place * F32_BYTES)) for place in range(4)],
        multiply_add=lambda v, a, w, total: v.fma(a, w, total),
    )
