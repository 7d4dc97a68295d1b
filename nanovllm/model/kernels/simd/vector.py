"""Vectors of float32 and int32: the operations that the kernels are written in.

Plain Numba loops do not reach the machine's speed: Numba widens 32-bit integers, does not fuse a
multiplication and an addition, and has no vector exp. So the innermost loops are written as LLVM
vector code, through llvmlite:

    acc = v.fma(v.splat(v.load_scalar(a, k)), v.load(w, k), acc)

A method of `Vectors` emits LLVM instructions when Python calls it and returns the LLVM value of
their result. So a Python loop emits its body once for each iteration, and a Python `if` chooses
what is emitted; `loop` and `when_equal` emit loops and branches. Kernels also use `builder`,
llvmlite's IRBuilder, for integer arithmetic and comparisons.

`lanes` is the number of float32 in a register: 16 with AVX-512, 8 with AVX2, 4 with SSE and NEON.
Addresses, counts and offsets are 64-bit integers. Offsets are in bytes.

Narrower values are packed in 32-bit words, one word for each lane: two bfloat16 or four int8. A
bfloat16 is the upper half of a float32, so a shift widens it.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.build.bounds import checked, size_of
from nanovllm.model.kernels.build.compiler import intrinsic
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import KernelTarget

F32 = ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
Value = Any  # llvmlite has no useful types for values
_EXPONENT_SHIFT = 12582912.0 + 127.0  # 1.5 * 2**23 + 127; see `exp`


class _Bfloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash(_Bfloat16)


class Vectors:
    """Operations on vectors of `lanes` float32 or int32.

    Attributes:
        builder: emits the code.
        target: instruction set that the code is compiled for.
        lanes: float32 in a vector.
        f32s, i32s: the LLVM types of vectors of float32 and of int32.
    """

    def __init__(self, builder: Any, target: KernelTarget) -> None:
        """Emit code for `target` through `builder`."""
        self.builder = builder
        self.target = target
        self.lanes = target.lanes
        self.f32s = ir.VectorType(F32, self.lanes)
        self.i32s = ir.VectorType(I32, self.lanes)

    def constant(self, number: float) -> Value:
        """Return a float32 constant in every lane."""
        return ir.Constant(self.f32s, [ir.Constant(F32, number)] * self.lanes)

    def integers(self, number: int) -> Value:
        """Return an int32 constant in every lane."""
        return ir.Constant(self.i32s, [ir.Constant(I32, number)] * self.lanes)

    def address(self, base: Value, *terms: Value | int) -> Value:
        """Return an address plus offsets in bytes."""
        for term in terms:
            base = self.builder.add(base, I64(term) if isinstance(term, int) else term)
        return base

    def element(self, base: Value, index: Value) -> Value:
        """Return the address of element `index` of a float32 or int32 array."""
        return self.address(base, self.times(index, WORD_BYTES))

    def times(self, value: Value, factor: int) -> Value:
        """Multiply a 64-bit integer by a constant."""
        return self.builder.mul(value, I64(factor))

    def load(self, base: Value, offset: int = 0) -> Value:
        """Load `lanes` float32."""
        return self._load(base, self.f32s, offset)

    def load_as(self, kind: Any, base: Value, offset: int = 0) -> Value:
        """Load a value of an LLVM type of float32 or int32."""
        return self._load(base, kind, offset)

    def load_scalar(self, base: Value, offset: int = 0) -> Value:
        """Load one float32."""
        return self._load(base, F32, offset)

    def load_words(self, base: Value, offset: int = 0) -> Value:
        """Load `lanes` 32-bit words."""
        return self._load(base, self.i32s, offset)

    def load_word(self, base: Value, offset: int = 0) -> Value:
        """Load one 32-bit word."""
        return self._load(base, I32, offset)

    def load_codes(self, base: Value, element: Any) -> Value:
        """Load `lanes` adjacent integers of type `element`, zero-extended to 32 bits each."""
        pointer = self._checked_pointer(base, ir.VectorType(element, self.lanes), 0)
        codes = self.builder.load(pointer, align=element.width // 8)
        return codes if element == I32 else self.builder.zext(codes, self.i32s)

    def store(self, value: Value, base: Value, offset: int = 0) -> None:
        """Store a vector or a scalar."""
        element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        align = element.width // 8 if isinstance(element, ir.IntType) else WORD_BYTES
        pointer = self._checked_pointer(base, value.type, offset, writes=True)
        self.builder.store(value, pointer, align=align)

    def prefetch(
        self, base: Value, offset: int = 0, *, nontemporal: bool = False, writes: bool = False
    ) -> None:
        """Prefetch a cache line for reading or for writing; any address is allowed.

        LLVM's locality 2 is the second-level cache on x86 (prefetcht1), 0 is nontemporal.
        """
        kinds = (I32(int(writes)), I32(0 if nontemporal else 2), I32(1))
        self._call("llvm.prefetch.p0", ir.VoidType(), self._pointer(base, I8, offset), *kinds)

    def splat(self, scalar: Value) -> Value:
        """Broadcast a scalar to every lane."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(self.i32s, [I32(0)] * self.lanes)
        )

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Return a * b + c, rounded once where the target has FMA."""
        if not self.target.has_fma:
            return self.add(self.multiply(a, b), c)
        return self._call(f"llvm.fma.v{self.lanes}f32", self.f32s, a, b, c)

    def dot_bfloat16(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of the bfloat16 pairs of each word, rounded as AVX512_BF16."""
        kind = ir.VectorType(_Bfloat16(), 2 * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.f32s, c, a, b)

    def dot_int8(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of each word's bytes, unsigned in `a` and signed in `b`."""
        kind = ir.VectorType(I8, 4 * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self._call(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.i32s, c, a, b)

    def dot_int16(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of the int16 pairs of each word."""
        kind = ir.VectorType(I16, 2 * self.lanes)
        names = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self.builder.add(c, self._call(f"llvm.x86.{names[self.lanes]}", self.i32s, a, b))

    def widen_bfloat16(self, words: Value) -> tuple[Value, Value]:
        """Return the lower and the upper bfloat16 of each word as float32, or of a single word."""
        kind, constant = (F32, I32) if words.type == I32 else (self.f32s, self.integers)
        first = self.builder.bitcast(self.builder.shl(words, constant(16)), kind)
        return first, self.builder.bitcast(self.builder.and_(words, constant(-65536)), kind)

    def to_float(self, integers: Value) -> Value:
        """Convert int32 to float32."""
        return self.builder.sitofp(integers, self.f32s)

    def round_bfloat16(self, x: Value) -> Value:
        """Round to the nearest bfloat16, ties to even; return its bits as int16.

        Rounding the bits of a NaN could carry into its exponent, so its quiet bit is set instead.
        """
        bits = self.builder.bitcast(x, self.i32s)
        odd = self.builder.and_(self.builder.lshr(bits, self.integers(16)), self.integers(1))
        rounded = self.builder.add(self.builder.add(bits, self.integers(0x7FFF)), odd)
        quiet = self.builder.or_(bits, self.integers(0x00400000))
        is_nan = self.builder.fcmp_unordered("uno", x, x)
        upper = self.builder.lshr(self.where(is_nan, quiet, rounded), self.integers(16))
        return self.builder.trunc(upper, ir.VectorType(I16, self.lanes))

    def round_int32(self, x: Value) -> Value:
        """Round to the nearest int32, ties to even, for |x| below 2**22.

        Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
        """
        shifted = self.builder.bitcast(self.add(x, self.constant(12582912.0)), self.i32s)
        return self.builder.sub(shifted, self.integers(0x4B400000))

    def clamp_integers(self, value: Value, low: int, high: int) -> Value:
        """Clamp int32 values to [low, high]."""
        for comparison, limit in ((">", self.integers(low)), ("<", self.integers(high))):
            inside = self.builder.icmp_signed(comparison, value, limit)
            value = self.builder.select(inside, value, limit)
        return value

    def magnitude(self, x: Value) -> Value:
        """Return |x|."""
        bits = self.builder.and_(self.builder.bitcast(x, self.i32s), self.integers(0x7FFFFFFF))
        return self.builder.bitcast(bits, self.f32s)

    def add(self, a: Value, b: Value) -> Value:
        """Return a + b."""
        return self.builder.fadd(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """Return a - b."""
        return self.builder.fsub(a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """Return a * b."""
        return self.builder.fmul(a, b)

    def divide(self, a: Value, b: Value) -> Value:
        """Return a / b."""
        return self.builder.fdiv(a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return the larger of a and b, and b where either is NaN.

        To propagate the NaN of a value, pass it second.
        """
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        """Return the smaller of a and b, and b where either is NaN; see `maximum`."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def first_lanes(self, count: Value) -> Value:
        """Return a mask for `where` of the first `count` lanes.

        It has none where count <= 0, all where count >= lanes. `count` must fit int32.
        """
        numbers = ir.Constant(self.i32s, [I32(lane) for lane in range(self.lanes)])
        return self.builder.icmp_signed("<", numbers, self.splat(self.builder.trunc(count, I32)))

    def where(self, mask: Value, a: Value, b: Value) -> Value:
        """Return a where the mask is set, b elsewhere."""
        return self.builder.select(mask, a, b)

    def sum(self, vector: Value) -> Value:
        """Return the sum of the lanes, added in a fixed order: halves onto halves."""
        return self._fold(vector, self.builder.fadd)

    def largest(self, vector: Value) -> Value:
        """Return the largest lane."""
        return self._fold(vector, self.maximum)

    def smallest(self, vector: Value) -> Value:
        """Return the smallest lane."""
        return self._fold(vector, self.minimum)

    def is_finite(self, x: Value) -> Value:
        """Return an int32 mask: -1 in lanes that are neither infinite nor NaN, else 0.

        Such masks are for `and_` and `every`; `where` takes masks of single bits.
        """
        exponent = self.integers(0x7F800000)
        bits = self.builder.and_(self.builder.bitcast(x, self.i32s), exponent)
        return self.builder.sext(self.builder.icmp_signed("!=", bits, exponent), self.i32s)

    def every(self, mask: Value) -> Value:
        """Return 1 as int64 if an int32 mask is -1 in every lane, else 0."""
        bits = self._fold(mask, self.builder.and_)
        return self.builder.zext(self.builder.icmp_signed("==", bits, I32(-1)), I64)

    def sqrt(self, x: Value) -> Value:
        """Return the square root of a float32, or of each lane."""
        suffix = "f32" if x.type == F32 else f"v{self.lanes}f32"
        return self._call(f"llvm.sqrt.{suffix}", x.type, x)

    def exp(self, x: Value) -> Value:
        """Return exp(x) with a relative error of 2e-7 for x from -87.3 to 88.3.

        A smaller x gives 0, a larger one infinity, NaN stays NaN. Cody and Waite's reduction:
        x = n ln 2 + r, with ln 2 in two parts so that r is exact; a Taylor polynomial of degree 7
        in r; times 2**n. Adding 1.5 * 2**23 + 127 rounds x / ln 2 to an integer and leaves n + 127
        in the low bits, which become the exponent of 2**n; n = 128 gives infinity. No result is
        denormal, because denormal numbers are slow on some CPUs.
        """
        is_normal = self.builder.fcmp_unordered(">=", x, self.constant(-87.3))
        x = self.minimum(self.constant(88.8), x)
        shifted = self.fma(x, self.constant(1.4426950408889634), self.constant(_EXPONENT_SHIFT))
        n = self.subtract(shifted, self.constant(_EXPONENT_SHIFT))
        r = self.fma(n, self.constant(-0.693145751953125), x)
        r = self.fma(n, self.constant(-1.4286068203094172e-06), r)
        result = self.constant(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            result = self.fma(result, r, self.constant(coefficient))
        exponent = self.builder.shl(self.builder.bitcast(shifted, self.i32s), self.integers(23))
        result = self.multiply(result, self.builder.bitcast(exponent, self.f32s))
        return self.where(is_normal, result, self.constant(0.0))

    def when_equal(self, value: Value, number: int) -> AbstractContextManager[Any]:
        """Return a context manager: what is emitted inside runs where `value == number`."""
        return self.builder.if_then(self.builder.icmp_signed("==", value, I64(number)))

    def loop(
        self,
        count: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """Emit `for i in range(0, count, step): carried = body(i, carried)`; return `carried`.

        `body` is called once, to emit the code of an iteration.
        """
        builder = self.builder
        before = builder.block
        head, inside, after = (
            builder.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end")
        )
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(I64(0), before)
        values = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        updated = body(index, list(values))
        index.add_incoming(builder.add(index, I64(step)), builder.block)
        for phi, value in zip(values, updated, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return values

    def _fold(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Reduce the lanes to one, halves onto halves."""
        count = vector.type.count
        while count > 1:
            count //= 2
            kind = ir.VectorType(I32, count)
            masks = [
                ir.Constant(kind, [I32(start + i) for i in range(count)]) for start in (0, count)
            ]
            low, high = (self.builder.shuffle_vector(vector, vector, mask) for mask in masks)
            vector = combine(low, high)
        return self.builder.extract_element(vector, I32(0))

    def _pointer(self, base: Value, kind: Any, offset: int) -> Value:
        address = self.address(base, offset) if offset else base
        return self.builder.inttoptr(address, ir.PointerType(kind))

    def _checked_pointer(
        self, base: Value, kind: Any, offset: int, *, writes: bool = False
    ) -> Value:
        """Return a pointer for a load or a store, checked where the target asks for it."""
        if not self.target.check:
            return self._pointer(base, kind, offset)
        address = self.address(base, offset)
        address = checked(self.builder, address, size_of(kind), writes=writes)
        return self._pointer(address, kind, 0)

    def _load(self, base: Value, kind: Any, offset: int) -> Value:
        return self.builder.load(self._checked_pointer(base, kind, offset), align=WORD_BYTES)

    def _call(self, name: str, returns: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)


def kernel(
    target: KernelTarget, emit: Callable[..., Value | None], returns: Any = types.void
) -> Any:
    """Make a function that compiled code can call and whose body `emit` emits.

    Args:
        target: what the code is compiled for.
        emit: emit(v, ...) emits the body through a Vectors, at every call. Its other parameters
            are those of the function, int64: addresses, strides in bytes and counts.
        returns: the Numba type of the result.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = list(inspect.signature(emit).parameters)[1:]

    def declare(typing_context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            result = emit(Vectors(builder, target), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*[types.intp] * len(names)), generate

    # Numba passes arguments by the names in the signature.
    declare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("typing_context", *names)]
    )
    return intrinsic(declare)
