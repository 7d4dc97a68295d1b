"""The vocabulary of the inner tiles: vectors of float32, and the few operations that the kernels are written in.

Plain Numba loops do not reach the machine's speed: Numba widens 32-bit integers, will not fuse a product and a sum, and has no vector
exp. So the innermost tiles are written as LLVM vector code, through llvmlite. All that is LLVM is in this file; a kernel says

    acc = v.fma(v.splat(v.load_scalar(a, k)), v.load(w, k), acc)

and means it. A `Vectors` is bound to one place in a function that is being compiled; `lanes` is how many float32 a register holds: 16
with AVX-512, 8 with AVX2, 4 with NEON. Addresses are integers, offsets are counted in bytes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nanovllm.model.kernels.compiler import intrinsic
from nanovllm.model.kernels.layout import F32_BYTES

F32, I1, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

Value = Any  # llvmlite's values have no useful types


class Vectors:
    """Operations on vectors of `lanes` float32, emitted where `builder` stands."""

    def __init__(self, builder: Any, lanes: int) -> None:
        """Emit through `builder`."""
        self.builder = builder
        self.lanes = lanes
        self.f32s = ir.VectorType(F32, lanes)
        self.i32s = ir.VectorType(I32, lanes)

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

    def store(self, value: Value, base: Value, offset: int = 0) -> None:
        """A vector or a number to memory."""
        self.builder.store(value, self._pointer(base, value.type, offset), align=F32_BYTES)

    def prefetch(self, base: Value, offset: int = 0) -> None:
        """Ask for a cache line that is needed soon; an address outside everything does no harm."""
        self._call("llvm.prefetch.p0", ir.VoidType(), self._pointer(base, I8, offset), I32(0), I32(2), I32(1))

    def splat(self, scalar: Value) -> Value:
        """A number in every lane."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(self.i32s, [I32(0)] * self.lanes))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self._call(f"llvm.fma.v{self.lanes}f32", self.f32s, a, b, c)

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
        """The larger of a and b; b where one is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller of a and b; b where one is not a number."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def first_lanes(self, count: Value) -> Value:
        """A mask of the first `count` lanes, which may be more than there are, or fewer than none."""
        wide = ir.VectorType(I64, self.lanes)
        numbers = ir.Constant(wide, [I64(lane) for lane in range(self.lanes)])
        one = self.builder.insert_element(ir.Constant(wide, ir.Undefined), count, I32(0))
        limit = self.builder.shuffle_vector(one, ir.Constant(wide, ir.Undefined), ir.Constant(self.i32s, [I32(0)] * self.lanes))
        return self.builder.icmp_signed("<", numbers, limit)

    def where(self, mask: Value, a: Value, b: Value) -> Value:
        """a in the lanes of the mask, b in the others."""
        return self.builder.select(mask, a, b)

    def sum(self, vector: Value) -> Value:
        """The lanes added up, always in the same order: halves onto halves."""
        return self._fold(vector, self.builder.fadd)

    def largest(self, vector: Value) -> Value:
        """The largest lane."""
        return self._fold(vector, self.maximum)

    def sqrt(self, scalar: Value) -> Value:
        """The square root of a number."""
        return self._call("llvm.sqrt.f32", F32, scalar)

    def exp(self, x: Value) -> Value:
        """e to the x, to 2e-7 of its value, for x from -87 to 88; outside, the value at that end.

        Cody and Waite's reduction: x = n ln 2 + r with ln 2 in two parts, so that r is exact; a Taylor polynomial of degree 7 in r;
        n added to the exponent. Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
        """
        x = self.maximum(x, self.constant(-87.0))
        x = self.minimum(x, self.constant(88.0))
        shifted = self.fma(x, self.constant(1.4426950408889634), self.constant(12582912.0))
        n = self.subtract(shifted, self.constant(12582912.0))
        r = self.fma(n, self.constant(-0.693145751953125), x)
        r = self.fma(n, self.constant(-1.4286068203094172e-06), r)
        result = self.constant(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            result = self.fma(result, r, self.constant(coefficient))
        exponent = self.builder.shl(self.builder.bitcast(shifted, self.i32s), self.integers(23))
        return self.builder.bitcast(self.builder.add(self.builder.bitcast(result, self.i32s), exponent), self.f32s)

    def loop(self, count: Value, step: int, carried: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]) -> list[Value]:
        """`for i in range(0, count, step): carried = body(i, carried)`; what is carried in the end. `count` may be 0."""
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end"))
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
            low, high = (ir.Constant(ir.VectorType(I32, count), [I32(start + lane) for lane in range(count)]) for start in (0, count))
            vector = combine(self.builder.shuffle_vector(vector, vector, low), self.builder.shuffle_vector(vector, vector, high))
        return self.builder.extract_element(vector, I32(0))

    def _pointer(self, base: Value, kind: Any, offset: int) -> Value:
        return self.builder.inttoptr(self.address(base, offset) if offset else base, ir.PointerType(kind))

    def _load(self, base: Value, kind: Any, offset: int) -> Value:
        return self.builder.load(self._pointer(base, kind, offset), align=F32_BYTES)

    def _call(self, name: str, returns: Any, *arguments: Value) -> Value:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)


def kernel(lanes: int, emit: Callable[..., Value | None], returns: Any = types.void) -> Any:
    """A function for compiled code whose body is vector code.

    `emit(v, ...)` gets a Vectors and the arguments, all of them integers: addresses, strides in bytes and counts.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = list(inspect.signature(emit).parameters)[1:]

    def declare(typing_context: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Value]) -> Value:
            result = emit(Vectors(builder, lanes), *values)
            return context.get_dummy_value() if result is None else result

        return returns(*[types.intp] * len(names)), generate

    # Numba passes arguments by the names that it sees.
    declare.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ("typing_context", *names)])  # type: ignore[attr-defined]
    return intrinsic(declare)
