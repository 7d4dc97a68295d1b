"""Storage formats of panels, and how a tile multiplies by them.

A step of a panel is one 32-bit word a column: one float32, two bfloat16 or four int8, which lie
below each other in the matrix. All types have the same layout, and the same tile walks down it;
only the multiply-add differs.

    matrix [d_in, d_out]  ->  panels [d_out / width][d_in / per_word][width][per_word]

At each step `Format.widen` turns a vector of words into operands once for all rows of the tile,
`inputs` makes the operands of one row, and `multiply_add` takes them in pairs.

Where a format widens, every tile does so again. So many rows share a piece of the panel that is
widened once, in memory: its steps, which are as many as a word has operands, are a panel of the
format `widened`. The terms of a sum are the same and come in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.value import F32, I16, Value
from nanovllm.model.kernels.simd.vector import Vectors


@dataclass(frozen=True, slots=True)
class Format:
    """Values of one type in panels.

    Attributes:
        input_bytes: bytes of a row of inputs that a step reads.
        accumulates_int32: accumulators are int32; otherwise float32.
        widen: widen(v, words) -> operands of the weights.
        inputs: inputs(v, address) -> as many operands of a row.
        multiply_add: multiply_add(v, input, weight, accumulator) -> the new accumulator.
        widened: format of a panel of the operands that `widen` returns; None if many rows take the
            panel as it is.
        widened_steps: how many steps of it are one step of this format.
    """

    input_bytes: int
    accumulates_int32: bool
    widen: Callable[[Vectors, Value], Sequence[Value]]
    inputs: Callable[[Vectors, Value], Sequence[Value]]
    multiply_add: Callable[[Vectors, Value, Value, Value], Value]
    widened: "Format | None" = None
    widened_steps: int = 1


def weight_format(target: KernelTarget, kind: str) -> Format:
    """Return the format of weights for inputs of the type `target.input_type(kind)`.

    The tile unit multiplies by instructions of its own (tile_unit.py).

    Args:
        target: what the code is compiled for.
        kind: "float32", "bfloat16", or "int8" for signed weights.
    """
    if kind == "float32":
        return _FLOAT32
    if kind == "bfloat16":
        return _BFLOAT16_WIDENED if target.input_type(kind) == "float32" else _BFLOAT16_DOT
    if target.int8_dot or target.int8_tiles:
        return _INT8_DOT
    return _INT8_BY_INT16 if target.is_x86 else _INT8_BY_INT32


def cache_format(target: KernelTarget, kind: str) -> Format:
    """Return the format of keys and values; see `Spec.attention_inputs`."""
    return _INT8_WIDENED if kind == "int8" else weight_format(target.without_tiles, kind)


def _sign_extend_to_int32(_: Vectors, words: Value) -> list[Value]:
    """Return bytes 0 to 3 of each word as int32."""
    shifted = [words << (24 - 8 * byte) for byte in range(3)]
    return [word >> 24 for word in (*shifted, words)]


def _zero_extend_to_int32(v: Vectors, words: Value) -> list[Value]:
    """Return bytes 0 to 3 of each word as int32."""
    shifted = (words.lshr(8 * byte) for byte in range(4))
    return [word & 255 for word in shifted]


def _sign_extend_to_int16(v: Vectors, words: Value) -> list[Value]:
    """Return bytes 0 and 2 of each word as a pair of int16, and bytes 1 and 3."""
    pairs = words.bitcast(I16)
    return [(pairs << 8) >> 8, pairs >> 8]


def _load_word(v: Vectors, address: Value) -> list[Value]:
    return [v.splat(v.load_word(address))]


def _words(_: Vectors, words: Value) -> list[Value]:
    return [words]


_FLOAT32 = Format(
    input_bytes=WORD_BYTES,
    accumulates_int32=False,
    widen=lambda v, words: [words.bitcast(F32)],
    inputs=lambda v, address: [v.splat(v.load_scalar(address))],
    multiply_add=Vectors.fma,
)
_BFLOAT16_DOT = Format(
    input_bytes=WORD_BYTES,
    accumulates_int32=False,
    widen=_words,
    inputs=_load_word,
    multiply_add=Vectors.dot_bfloat16,
)
_BFLOAT16_WIDENED = Format(  # inputs are float32
    input_bytes=2 * WORD_BYTES,
    accumulates_int32=False,
    widen=Vectors.widen_bfloat16,
    inputs=lambda v, address: [
        v.splat(v.load_scalar(address, row * WORD_BYTES)) for row in range(2)
    ],
    multiply_add=Vectors.fma,
    widened=_FLOAT32,
    widened_steps=2,
)
_INT8_DOT = Format(
    input_bytes=WORD_BYTES,
    accumulates_int32=True,
    widen=_words,
    inputs=_load_word,
    multiply_add=Vectors.dot_int8,
)
_INT16 = replace(_INT8_DOT, multiply_add=Vectors.dot_int16)
_INT8_BY_INT16 = replace(  # inputs are int16 in the order of the bytes 0, 2, 1, 3 of each word
    _INT16,
    input_bytes=2 * WORD_BYTES,
    widen=_sign_extend_to_int16,
    inputs=lambda v, address: [
        v.splat(v.load_word(address, pair * WORD_BYTES)) for pair in range(2)
    ],
    widened=_INT16,
    widened_steps=2,
)
_INT8_BY_INT32 = replace(
    _INT8_DOT,
    widen=_sign_extend_to_int32,
    inputs=lambda v, address: _zero_extend_to_int32(v, v.splat(v.load_word(address))),
    multiply_add=lambda v, a, w, total: total + a * w,
)
_INT8_WIDENED = Format(  # keys and values, whose inputs are float32
    input_bytes=4 * WORD_BYTES,
    accumulates_int32=False,
    widen=lambda v, words: [byte.to_float() for byte in _sign_extend_to_int32(v, words)],
    inputs=lambda v, address: [
        v.splat(v.load_scalar(address, row * WORD_BYTES)) for row in range(4)
    ],
    multiply_add=Vectors.fma,
)
