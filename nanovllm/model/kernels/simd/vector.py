"""Vectors of float32 and int32: the operations that the kernels are written in.

Plain Numba loops do not reach the machine's speed: Numba widens 32-bit integers, does not fuse a
multiplication and an addition, and has no vector exp. So the innermost loops are written as LLVM
vector code, through llvmlite:

    acc = v.fma(v.splat(v.load_scalar(a_ptr)), v.load(w_ptr), acc)
    out = 0.5 * x * (1.0 + v.exp(-x))

An operator of a `Value` (value.py) or a method of `Vectors` emits LLVM instructions when Python
calls it and returns their result. So a Python loop emits its body once for each iteration, and a
Python `if` chooses what is emitted; `loop` and `when` emit loops and branches.

`lanes` is the number of float32 in a register: 16 with AVX-512, 8 with AVX2, 4 with SSE and NEON.
Addresses, counts and offsets are 64-bit integers. Offsets are in bytes.

Narrower values are packed in 32-bit words, one word for each lane: two bfloat16 or four int8. A
bfloat16 is the upper half of a float32, so a shift widens it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from nanovllm.model.kernels.build.check_code import checked, size_of
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.peak import instruction
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.value import F32, I8, I16, I32, I64, Value, constant

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

    Where a method takes several values of one type, some may be numbers: constants of that type.

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

    @property
    def unchecked(self) -> "Vectors":
        """The same without checks of addresses, for memory of the function itself."""
        return Vectors(self.builder, replace(self.target, check=False))

    def constant(self, number: float, element: Any = F32) -> Value:
        """Return a constant in every lane, of float32 or another type."""
        return Value(self.builder, constant(ir.VectorType(element, self.lanes), number))

    def integers(self, number: int) -> Value:
        """Return an int32 constant in every lane."""
        return Value(self.builder, constant(self.i32s, number))

    def scalar(self, number: float, kind: Any = I64) -> Value:
        """Return a scalar constant of int64, the type of addresses and counts, or another type."""
        return Value(self.builder, constant(kind, number))

    def lane_numbers(self) -> Value:
        """Return the int32 vector 0, 1, 2, ..."""
        numbers = [I32(lane) for lane in range(self.lanes)]
        return Value(self.builder, ir.Constant(self.i32s, numbers))

    def integer_argument(self, integer: Value) -> Value:
        """Broadcast the lower 32 bits of an argument to every lane."""
        return self.splat(integer.trunc(I32))

    def element(self, base: Value, index: Value) -> Value:
        """Return the address of element `index` of a float32 or int32 array."""
        return base + index * WORD_BYTES

    def load(self, base: Value, offset: int = 0) -> Value:
        """Load `lanes` float32."""
        return self.load_as(self.f32s, base, offset)

    def load_as(self, kind: Any, base: Value, offset: int = 0) -> Value:
        """Load a value of an LLVM type of float32 or int32."""
        pointer = self._checked_pointer(base, kind, offset)
        return Value(self.builder, self.builder.load(pointer, align=WORD_BYTES))

    def load_scalar(self, base: Value, offset: int = 0) -> Value:
        """Load one float32."""
        return self.load_as(F32, base, offset)

    def load_words(self, base: Value, offset: int = 0) -> Value:
        """Load `lanes` 32-bit words."""
        return self.load_as(self.i32s, base, offset)

    def load_word(self, base: Value, offset: int = 0) -> Value:
        """Load one 32-bit word."""
        return self.load_as(I32, base, offset)

    def load_codes(self, base: Value, element: Any) -> Value:
        """Load `lanes` adjacent integers of type `element`, zero-extended to 32 bits each."""
        pointer = self._checked_pointer(base, ir.VectorType(element, self.lanes), 0)
        codes = Value(self.builder, self.builder.load(pointer, align=element.width // 8))
        return codes if element == I32 else codes.zext(I32)

    def store(self, value: Value, base: Value, offset: int = 0) -> None:
        """Store a vector or a scalar."""
        element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        align = element.width // 8 if isinstance(element, ir.IntType) else WORD_BYTES
        pointer = self._checked_pointer(base, value.type, offset, writes=True)
        self.builder.store(value.ir, pointer, align=align)

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
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        one = self.builder.insert_element(undefined, scalar.ir, I32(0))
        zeros = constant(self.i32s, 0)
        return Value(self.builder, self.builder.shuffle_vector(one, undefined, zeros))

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Return a vector of these lanes of `a` and `b`; those of `b` count on from a's."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
        return Value(self.builder, self.builder.shuffle_vector(a.ir, b.ir, mask))

    def fma(self, a: Value, b: Value | float, c: Value | float) -> Value:
        """Return a * b + c, rounded once where the target has FMA."""
        if not self.target.has_fma:
            return a * b + c
        return self._call(f"llvm.fma.v{self.lanes}f32", self.f32s, *self._alike(a, b, c))

    def dot_bfloat16(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of the bfloat16 pairs of each word, rounded by the CPU."""
        kind = ir.VectorType(_Bfloat16(), 2 * self.lanes)
        pairs = (self.builder.bitcast(words.ir, kind) for words in (a, b))
        return self._call(instruction("bfloat16", self.lanes).name, self.f32s, c.ir, *pairs)

    def dot_int8(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of each word's bytes, signed in `b`.

        In `a` they are unsigned on x86, signed on ARM (KernelTarget.int8_offset).
        """
        parts = (words.bitcast(I8).ir for words in (a, b))
        return self._call(instruction("int8", self.lanes).name, self.i32s, c.ir, *parts)

    def dot_int16(self, a: Value, b: Value, c: Value) -> Value:
        """Return c + the dot product of the int16 pairs of each word."""
        names = {16: "avx512.pmaddw.d.512", 8: "avx2.pmadd.wd", 4: "sse2.pmadd.wd"}
        parts = (words.bitcast(I16).ir for words in (a, b))
        return c + self._call(f"llvm.x86.{names[self.lanes]}", self.i32s, *parts)

    def widen_bfloat16(self, words: Value) -> tuple[Value, Value]:
        """Return the lower and the upper bfloat16 of each word as float32, or of a single word."""
        return (words << 16).bitcast(F32), (words & -65536).bitcast(F32)

    def round_bfloat16(self, x: Value) -> Value:
        """Round to the nearest bfloat16, ties to even; return its bits as int16.

        Rounding the bits of a NaN could carry into its exponent, so its quiet bit is set instead.
        """
        bits = x.bitcast(I32)
        odd = bits.lshr(16) & 1
        rounded = bits + 0x7FFF + odd
        quiet = bits | 0x00400000
        return self.where(x.is_nan(), quiet, rounded).lshr(16).trunc(I16)

    def round_int32(self, x: Value) -> Value:
        """Round to the nearest int32, ties to even, for |x| below 2**22.

        Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits.
        """
        return (x + 12582912.0).bitcast(I32) - 0x4B400000

    def magnitude(self, x: Value) -> Value:
        """Return |x|."""
        return (x.bitcast(I32) & 0x7FFFFFFF).bitcast(F32)

    def maximum(self, a: Value | float, b: Value | float) -> Value:
        """Return the larger of a and b, and b where either is not greater, as where one is NaN.

        To propagate the NaN of a value, pass it second.
        """
        a, b = self._values(a, b)
        return self.where(a > b, a, b)

    def minimum(self, a: Value | float, b: Value | float) -> Value:
        """Return the smaller of a and b, and b where either is NaN; see `maximum`."""
        a, b = self._values(a, b)
        return self.where(a < b, a, b)

    def first_lanes(self, count: Value) -> Value:
        """Return a mask for `where` of the first `count` lanes.

        It has none where count <= 0, all where count >= lanes. `count` must fit int32.
        """
        return self.lane_numbers() < self.splat(count.trunc(I32))

    def where(self, mask: Value, a: Value | float, b: Value | float) -> Value:
        """Return a where the mask is set, b elsewhere."""
        return Value(self.builder, self.builder.select(mask.ir, *self._alike(a, b)))

    def sum(self, vector: Value) -> Value:
        """Return the sum of the lanes, added in a fixed order: halves onto halves."""
        return self._fold(vector, lambda low, high: low + high)

    def largest(self, vector: Value) -> Value:
        """Return the largest lane."""
        return self._fold(vector, self.maximum)

    def smallest(self, vector: Value) -> Value:
        """Return the smallest lane."""
        return self._fold(vector, self.minimum)

    def is_finite(self, x: Value) -> Value:
        """Return an int32 mask: -1 in lanes that are neither infinite nor NaN, else 0.

        Such masks are for `&` and `every`; `where` takes masks of single bits.
        """
        exponent = 0x7F800000
        return ((x.bitcast(I32) & exponent) != exponent).sext(I32)

    def every(self, mask: Value) -> Value:
        """Return 1 as int64 if an int32 mask is -1 in every lane, else 0."""
        return (self._fold(mask, lambda low, high: low & high) == -1).zext(I64)

    def sqrt(self, x: Value) -> Value:
        """Return the square root of a float32, or of each lane."""
        suffix = "f32" if x.type == F32 else f"v{self.lanes}f32"
        return self._call(f"llvm.sqrt.{suffix}", x.type, x.ir)

    def exp(self, x: Value) -> Value:
        """Return exp(x) with a relative error of 2e-7 for x from -87.3 to 88.3.

        A smaller x gives 0, a larger one infinity, NaN stays NaN. Cody and Waite's reduction:
        x = n ln 2 + r, with ln 2 in two parts so that r is exact; a Taylor polynomial of degree 7
        in r; times 2**n. Adding 1.5 * 2**23 + 127 rounds x / ln 2 to an integer and leaves n + 127
        in the low bits, which become the exponent of 2**n; n = 128 gives infinity. No result is
        denormal, because denormal numbers are slow on some CPUs.
        """
        is_normal = x.not_below(-87.3)
        x = self.minimum(88.8, x)
        shifted = self.fma(x, 1.4426950408889634, _EXPONENT_SHIFT)
        n = shifted - _EXPONENT_SHIFT
        r = self.fma(n, -0.693145751953125, x)
        r = self.fma(n, -1.4286068203094172e-06, r)
        result = self.constant(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            result = self.fma(result, r, coefficient)
        power_of_two = (shifted.bitcast(I32) << 23).bitcast(F32)
        return self.where(is_normal, result * power_of_two, 0.0)

    def when(self, condition: Value) -> AbstractContextManager[Any]:
        """Return a context manager: what is emitted inside runs where the condition holds."""
        context: AbstractContextManager[Any] = self.builder.if_then(condition.ir)
        return context

    def when_else(self, condition: Value) -> AbstractContextManager[Any]:
        """Return a context manager of two: what is emitted in the second runs elsewhere."""
        context: AbstractContextManager[Any] = self.builder.if_else(condition.ir)
        return context

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
        with self._loop(count, step, carried) as (index, values, updated):
            updated.extend(body(index, list(values)))
        return values

    def fold(
        self, count: Value, step: int, initial: Value, body: Callable[[Value, Value], Value]
    ) -> Value:
        """Emit `loop` with one carried value: `value = body(i, value)`; return it."""
        return self.loop(count, step, [initial], lambda i, carried: [body(i, carried[0])])[0]

    @contextmanager
    def range(self, count: Value, step: int = 1) -> Iterator[Value]:
        """Emit `for i in range(0, count, step):` and what is emitted inside as its body.

        with v.range(count, v.lanes) as i:
            v.store(v.constant(0.0), v.element(out_ptr, i))
        """
        with self._loop(count, step, ()) as (index, _, _):
            yield index

    @contextmanager
    def _loop(
        self, count: Value, step: int, carried: Sequence[Value]
    ) -> Iterator[tuple[Value, list[Value], list[Value]]]:
        """Yield the index, the carried values, and a list for their values after an iteration."""
        builder = self.builder
        before = builder.block
        head, inside, after = (
            builder.append_basic_block(name) for name in ("loop.head", "loop.body", "loop.end")
        )
        builder.branch(head)
        builder.position_at_end(head)
        phis = [builder.phi(I64), *(builder.phi(value.type) for value in carried)]
        for phi, first in zip(phis, (I64(0), *(value.ir for value in carried)), strict=True):
            phi.add_incoming(first, before)
        index, *values = (Value(builder, phi) for phi in phis)
        builder.cbranch((index < count).ir, inside, after)
        builder.position_at_end(inside)
        updated: list[Value] = []
        yield index, values, updated
        for phi, value in zip(phis, (index + step, *updated), strict=True):
            phi.add_incoming(value.ir, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def _fold(self, vector: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """Reduce the lanes to one, halves onto halves."""
        count = vector.type.count
        while count > 1:
            count //= 2
            low, high = (
                self.shuffle(vector, vector, range(first, first + count)) for first in (0, count)
            )
            vector = combine(low, high)
        return vector.lane(0)

    def _values(self, *operands: Value | float) -> list[Value]:
        """Return the operands as values; numbers are constants of the type of the others."""
        kind = next((each.type for each in operands if isinstance(each, Value)), self.f32s)
        return [
            each if isinstance(each, Value) else Value(self.builder, constant(kind, each))
            for each in operands
        ]

    def _alike(self, *operands: Value | float) -> list[Any]:
        """Return llvmlite's values of the operands; see `_values`."""
        return [value.ir for value in self._values(*operands)]

    def _pointer(self, base: Value, kind: Any, offset: int) -> Any:
        address = base + offset if offset else base
        return self.builder.inttoptr(address.ir, ir.PointerType(kind))

    def _checked_pointer(self, base: Value, kind: Any, offset: int, *, writes: bool = False) -> Any:
        """Return a pointer for a load or a store, checked where the target asks for it."""
        if not self.target.check:
            return self._pointer(base, kind, offset)
        address = checked(self.builder, (base + offset).ir, size_of(kind), writes=writes)
        return self.builder.inttoptr(address, ir.PointerType(kind))

    def _call(self, name: str, returns: Any, *arguments: Any) -> Value:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Value(self.builder, self.builder.call(function, arguments))
