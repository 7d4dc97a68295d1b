"""The vocabulary of the inner tiles: vectors of float32, and the few operations that the kernels are written in.

Plain Numba loops do not reach the machine's speed: Numba widens 32-bit integers, will not fuse a product and a sum, and has no vector
exp. So the innermost tiles are written as LLVM vector code, through llvmlite. All that is LLVM is in this file; a kernel says

    acc = v.fma(v.splat(v.load_scalar(a, k)), v.load(w, k), acc)

and means it. A `Vectors` is bound to one place in a function that is being compiled; `lanes` is how many float32 a register holds: 16
with AVX-512, 8 with AVX2, 4 with NEON. Addresses are integers, offsets are counted in bytes.

Numbers that are narrower than a float32 come packed in words of 32 bits, one word a lane: two bfloat16 or four int8. bfloat16 is the
upper half of a float32, so widening it is a shift.
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
from nanovllm.model.kernels.build.layout import F32_BYTES
from nanovllm.model.kernels.build.target import KernelTarget

F32, I1, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)

Value = Any  # llvmlite's values have no useful types
_EXPONENT_SHIFT = 12582912.0 + 127.0


class _Bfloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash(_Bfloat16)


class Vectors:
    """Operations on vectors of `lanes` float32, emitted where `builder` stands."""

    def __init__(self, builder: Any, target: KernelTarget) -> None:
        """Emit through `builder`."""
        self.builder = builder
        self.target = target
        self.lanes = target.lanes
        self.f32s = ir.VectorType(F32, self.lanes)
        self.i32s = ir.VectorType(I32, self.lanes)

    def constant(self, number: float) -> Value:
        """The same float32 in every lane."""
        return ir.Constant(self.f32s, [ir.Constant(F32, number)] * self.lanes)

    def integers(self, number: int) -> Value:
        """The same 32-bit integer in every lane."""
        return ir.Constant(self.i32s, [ir.Constant(I32, number)] * self.lanes)

    def address(self, base: Value, *terms: Value | int) -> Value:
        """base plus the terms, in bytes."""
        for term in terms:
            base = self.builder.add(base, I64(term) if isinstance(term, int) else term)
        return base

    def element(self, base: Value, index: Value) -> Value:
        """Address of float32 number `index` from `base`."""
        return self.address(base, self.times(index, F32_BYTES))

    def times(self, value: Value, factor: int) -> Value:
        """An address or a count times a constant."""
        return self.builder.mul(value, I64(factor))

    def load(self, base: Value, offset: int = 0) -> Value:
        """`lanes` float32 from memory."""
        return self._load(base, self.f32s, offset)

    def load_scalar(self, base: Value, offset: int = 0) -> Value:
        """One float32 from memory."""
        return self._load(base, F32, offset)

    def load_words(self, base: Value, offset: int = 0) -> Value:
        """`lanes` words of 32 bits from memory."""
        return self._load(base, self.i32s, offset)

    def load_word(self, base: Value, offset: int = 0) -> Value:
        """One word of 32 bits from memory."""
        return self._load(base, I32, offset)

    def load_codes(self, base: Value, element: Any) -> Value:
        """`lanes` unsigned integers of type `element` from memory, one in each word."""
        codes = self.builder.load(
            self._reach(base, ir.VectorType(element, self.lanes), 0), align=element.width // 8
        )
        return codes if element == I32 else self.builder.zext(codes, self.i32s)

    def store(self, value: Value, base: Value, offset: int = 0) -> None:
        """A vector or a number to memory."""
        element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        align = element.width // 8 if isinstance(element, ir.IntType) else F32_BYTES
        self.builder.store(value, self._reach(base, value.type, offset, writes=True), align=align)

    def prefetch(
        self, base: Value, offset: int = 0, *, nontemporal: bool = False, writes: bool = False
    ) -> None:
        """Ask for a cache line that is needed soon, or soon and only `once`, or to be written; an address outside everything does no harm."""
        kinds = (I32(int(writes)), I32(0 if nontemporal else 2), I32(1))
        self._call("llvm.prefetch.p0", ir.VoidType(), self._pointer(base, I8, offset), *kinds)

    def splat(self, scalar: Value) -> Value:
        """A number in every lane."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(self.i32s, [I32(0)] * self.lanes)
        )

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the processor can."""
        if not self.target.has_fma:
            return self.add(self.multiply(a, b), c)
        return self._call(f"llvm.fma.v{self.lanes}f32", self.f32s, a, b, c)

    def dot_bfloat16(self, a: Value, b: Value, c: Value) -> Value:
        """c + the sum of a * b over the two bfloat16 in each word, with this processor's own rounding."""
        kind = ir.VectorType(_Bfloat16(), 2 * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self._call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}", self.f32s, c, a, b)

    def dot_int8(self, a: Value, b: Value, c: Value) -> Value:
        """c + the sum of a * b over the four bytes in each word, those of `a` unsigned, those of `b` signed."""
        kind = ir.VectorType(I8, 4 * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self._call(f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.i32s, c, a, b)

    def dot_int16(self, a: Value, b: Value, c: Value) -> Value:
        """c + the sum of a * b over the two int16 in each word."""
        kind = ir.VectorType(I16, 2 * self.lanes)
        name = {
            16: "llvm.x86.avx512.pmaddw.d.512",
            8: "llvm.x86.avx2.pmadd.wd",
            4: "llvm.x86.sse2.pmadd.wd",
        }[self.lanes]
        return self.builder.add(
            c,
            self._call(
                name, self.i32s, self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
            ),
        )

    def widen_bfloat16(self, words: Value) -> tuple[Value, Value]:
        """The first and the second bfloat16 of each word as float32; of a vector or of one word."""
        kind, low, high = (
            (F32, I32(16), I32(-65536))
            if words.type == I32
            else (self.f32s, self.integers(16), self.integers(-65536))
        )
        return self.builder.bitcast(self.builder.shl(words, low), kind), self.builder.bitcast(
            self.builder.and_(words, high), kind
        )

    def signed_bytes(self, words: Value) -> list[Value]:
        """The four signed bytes of each word, as 32-bit integers."""
        shifted = [self.builder.shl(words, self.integers(24 - 8 * place)) for place in range(3)]
        return [self.builder.ashr(word, self.integers(24)) for word in (*shifted, words)]

    def unsigned_bytes(self, words: Value) -> list[Value]:
        """The four unsigned bytes of each word, as 32-bit integers."""
        return [
            self.builder.and_(
                self.builder.lshr(words, self.integers(8 * place)), self.integers(255)
            )
            for place in range(4)
        ]

    def signed_halves(self, words: Value) -> list[Value]:
        """The signed bytes 0 and 2 of each word as two int16, and the signed bytes 1 and 3."""
        kind = ir.VectorType(I16, 2 * self.lanes)
        eight = ir.Constant(kind, [I16(8)] * (2 * self.lanes))
        halves = self.builder.bitcast(words, kind)
        return [
            self.builder.ashr(self.builder.shl(halves, eight), eight),
            self.builder.ashr(halves, eight),
        ]

    def unsigned_halves(self, words: Value) -> list[Value]:
        """The unsigned bytes 0 and 2 of each word as two int16, and the unsigned bytes 1 and 3."""
        mask = self.integers(0x00FF00FF)
        return [
            self.builder.and_(words, mask),
            self.builder.and_(self.builder.lshr(words, self.integers(8)), mask),
        ]

    def to_float(self, integers: Value) -> Value:
        """32-bit integers as float32."""
        return self.builder.sitofp(integers, self.f32s)

    def round_bfloat16(self, x: Value) -> Value:
        """Round to the nearest bfloat16, ties to even, as 16-bit integers; a NaN stays a NaN.

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
        """The nearest whole number as a 32-bit integer, the even one of two that are equally near; for |x| below 2**22.

        Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
        """
        shifted = self.builder.bitcast(self.add(x, self.constant(12582912.0)), self.i32s)
        return self.builder.sub(shifted, self.integers(0x4B400000))

    def clamp_integers(self, value: Value, low: int, high: int) -> Value:
        """Integers kept between two others."""
        value = self.builder.select(
            self.builder.icmp_signed(">", value, self.integers(low)), value, self.integers(low)
        )
        return self.builder.select(
            self.builder.icmp_signed("<", value, self.integers(high)), value, self.integers(high)
        )

    def magnitude(self, x: Value) -> Value:
        """|x|."""
        return self.builder.bitcast(
            self.builder.and_(self.builder.bitcast(x, self.i32s), self.integers(0x7FFFFFFF)),
            self.f32s,
        )

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self.builder.fadd(a, b)

    def subtract(self, a: Value, b: Value) -> Value:
        """a - b."""
        return self.builder.fsub(a, b)

    def multiply(self, a: Value, b: Value) -> Value:
        """a * b."""
        return self.builder.fmul(a, b)

    def divide(self, a: Value, b: Value) -> Value:
        """a / b."""
        return self.builder.fdiv(a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """Return the larger of a and b, and b where either is a NaN.

        Where one is a constant, the value belongs second, so that its NaN stays.
        """
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        """Return the smaller of a and b, and b where either is a NaN; see `maximum`."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def first_lanes(self, count: Value) -> Value:
        """A mask of the first `count` lanes, which may be more than there are, or fewer than none; within 32 bits."""
        numbers = ir.Constant(self.i32s, [I32(lane) for lane in range(self.lanes)])
        return self.builder.icmp_signed("<", numbers, self.splat(self.builder.trunc(count, I32)))

    def where(self, mask: Value, a: Value, b: Value) -> Value:
        """a in the lanes of the mask, b in the others."""
        return self.builder.select(mask, a, b)

    def sum(self, vector: Value) -> Value:
        """The lanes added up, always in the same order: halves onto halves."""
        return self._fold(vector, self.builder.fadd)

    def largest(self, vector: Value) -> Value:
        """The largest lane."""
        return self._fold(vector, self.maximum)

    def smallest(self, vector: Value) -> Value:
        """The smallest lane."""
        return self._fold(vector, self.minimum)

    def is_finite(self, x: Value) -> Value:
        """All bits of a 32-bit integer in the lanes that are neither infinite nor a NaN."""
        exponent = self.integers(0x7F800000)
        bits = self.builder.and_(self.builder.bitcast(x, self.i32s), exponent)
        return self.builder.sext(self.builder.icmp_signed("!=", bits, exponent), self.i32s)

    def every(self, mask: Value) -> Value:
        """Whether all bits of all lanes are set, as a 64-bit 1 or 0."""
        return self.builder.zext(
            self.builder.icmp_signed("==", self._fold(mask, self.builder.and_), I32(-1)), I64
        )

    def sqrt(self, scalar: Value) -> Value:
        """The square root of a number."""
        return self._call("llvm.sqrt.f32", F32, scalar)

    def exp(self, x: Value) -> Value:
        """Compute e to the x to 2e-7 of its value for x from -87.3 to 88.3.

        Below that it is 0, above that infinity, and a NaN stays a NaN. Cody and Waite's reduction:
        x = n ln 2 + r with ln 2 in two parts, so that r is exact; a Taylor polynomial of degree 7
        in r; times 2 to the n. Adding 1.5 * 2**23 + 127 rounds x / ln 2 to a whole number and
        leaves n + 127 in the low bits, which become the exponent of 2 to the n; at 128 it is
        infinity. No result is a denormal number: those are slow on some processors.
        """
        is_positive = self.builder.fcmp_unordered(">=", x, self.constant(-87.3))
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
        return self.where(is_positive, result, self.constant(0.0))

    def when_equal(self, value: Value, number: int) -> AbstractContextManager[Any]:
        """`if value == number:`, for what is emitted inside."""
        return self.builder.if_then(self.builder.icmp_signed("==", value, I64(number)))

    def loop(
        self,
        count: Value,
        step: int,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """`for i in range(0, count, step): carried = body(i, carried)`; what is carried in the end. `count` may be 0."""
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
        renewed = body(index, list(values))
        following = builder.add(index, I64(step))
        index.add_incoming(following, builder.block)
        for phi, value in zip(values, renewed, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return values

    def _fold(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        count = vector.type.count
        while count > 1:
            count //= 2
            low, high = (
                ir.Constant(ir.VectorType(I32, count), [I32(start + lane) for lane in range(count)])
                for start in (0, count)
            )
            vector = combine(
                self.builder.shuffle_vector(vector, vector, low),
                self.builder.shuffle_vector(vector, vector, high),
            )
        return self.builder.extract_element(vector, I32(0))

    def _pointer(self, base: Value, kind: Any, offset: int) -> Value:
        return self.builder.inttoptr(
            self.address(base, offset) if offset else base, ir.PointerType(kind)
        )

    def _reach(self, base: Value, kind: Any, offset: int, *, writes: bool = False) -> Value:
        """A pointer that is about to be used."""
        if self.target.check:
            base, offset = (
                checked(self.builder, self.address(base, offset), size_of(kind), writes=writes),
                0,
            )
        return self._pointer(base, kind, offset)

    def _load(self, base: Value, kind: Any, offset: int) -> Value:
        return self.builder.load(self._reach(base, kind, offset), align=F32_BYTES)

    def _call(self, name: str, returns: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, name), arguments
        )


def kernel(
    target: KernelTarget, emit: Callable[..., Value | None], returns: Any = types.void
) -> Any:
    """A function for compiled code whose body is vector code.

    `emit(v, ...)` gets a Vectors and the arguments, all of them integers: addresses, strides in bytes and counts.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = list(inspect.signature(emit).parameters)[1:]

    def declare(typing_context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            result = emit(Vectors(builder, target), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*[types.intp] * len(names)), generate

    # Numba passes arguments by the names that it sees.
    declare.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("typing_context", *names)]
    )
    return intrinsic(declare)
