"""The tile unit of a CPU (Intel AMX): registers of 16 rows of 16 words, multiplied by each other.

    accumulators [rows, 16] += inputs [rows, 16 words] @ weights [16 words, 16 columns]

Words are those of a panel (formats.py): a pair of bfloat16 or four int8, which lie below each other
in a column. So 16 steps of 16 columns of a panel are a tile of weights as they are, and 16 words of
up to 16 input rows are a tile of inputs. Intel's manual defines the bits (Intel 64 and IA-32
Architectures Software Developer's Manual, TDPBUSD and TDPBF16PS):

    int8      exact sums in int32 of unsigned inputs times signed weights
    bfloat16  one chain of float32 multiply-adds for the first and one for the second numbers of the
              16 words, both from 0; then accumulator + (first + second). Each result is rounded to
              nearest even; denormal inputs and results count as 0, whatever the thread's mode.

The emulation computes the same bits from vectors, so that the code around the unit is tested on any
CPU. build/tile_twin.py is the same in NumPy.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import UNIT_STEPS
from nanovllm.model.kernels.build.tile_twin import FLUSHED_BELOW, TILE_BYTES, configuration
from nanovllm.model.kernels.simd.rows import Rows
from nanovllm.model.kernels.simd.value import I8, I32, I64, Value
from nanovllm.model.kernels.simd.vector import Vectors

UNIT_ROWS = 16
"""Most rows of a tile."""
UNIT_COLUMNS = 16
"""Columns of a tile of weights or accumulators."""
ROW_BYTES = 64
INPUTS = 4
"""The register of the inputs; those below are accumulators."""
WEIGHTS = (5, 6, 7)
"""The registers of weights, which always have 16 rows."""
_REGISTERS = 8


class TileUnit:
    """The unit's instructions for one type of weights; subclasses emit them."""

    def __init__(self, v: Vectors, kind: str) -> None:
        """Emit code by `v` for weights of type `kind`, "bfloat16" or "int8"."""
        self.v, self.kind = v, kind

    def configure(self, rows: Value) -> None:
        """Emit: accumulators and inputs have `rows` rows from now on, 1 to 16."""
        raise NotImplementedError

    def load(self, register: int, source: Rows) -> None:
        """Emit: load a register from rows of 64 bytes."""
        raise NotImplementedError

    def multiply_add(self, accumulators: int, weights: int) -> None:
        """Emit: accumulators += inputs @ weights."""
        raise NotImplementedError

    def store(self, register: int, out: Rows) -> None:
        """Emit: store a register to rows of 64 bytes."""
        raise NotImplementedError

    def release(self) -> None:
        """Emit: give the registers up, so that the system need not save them."""
        raise NotImplementedError


def tile_unit(v: Vectors, kind: str) -> TileUnit:
    """Return the CPU's unit, or an emulation where the target asks for it or checks addresses."""
    is_emulated = v.target.emulates_tiles or v.target.check
    return _EmulatedUnit(v, kind) if is_emulated else _AmxUnit(v, kind)


class _AmxUnit(TileUnit):
    """LLVM's intrinsics with register numbers: no other code of the kernels uses the unit."""

    def configure(self, rows: Value) -> None:
        configurations = [configuration(count) for count in range(1, UNIT_ROWS + 1)]
        table = b"".join(configurations)
        module, kind = self.v.builder.module, ir.ArrayType(I8, len(table))
        constant = ir.GlobalVariable(module, kind, module.get_unique_name("tile_configurations"))
        constant.linkage, constant.global_constant = "internal", True
        constant.initializer = ir.Constant(kind, bytearray(table))
        first = Value(self.v.builder, self.v.builder.ptrtoint(constant, I64))
        self._call("ldtilecfg", self._pointer(first + (rows - 1) * len(configurations[0])))

    def load(self, register: int, source: Rows) -> None:
        place = self._pointer(source.ptr), source.stride_bytes.ir
        self._call("tileloadd64", I8(register), *place)

    def multiply_add(self, accumulators: int, weights: int) -> None:
        name = {"bfloat16": "tdpbf16ps", "int8": "tdpbusd"}[self.kind]
        self._call(name, I8(accumulators), I8(INPUTS), I8(weights))

    def store(self, register: int, out: Rows) -> None:
        place = self._pointer(out.ptr), out.stride_bytes.ir
        self._call("tilestored64", I8(register), *place)

    def release(self) -> None:
        self._call("tilerelease")

    def _pointer(self, address: Value) -> Any:
        return self.v.builder.inttoptr(address.ir, ir.PointerType(I8))

    def _call(self, name: str, *arguments: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        builder = self.v.builder
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
        builder.call(function, arguments)


class _EmulatedUnit(TileUnit):
    """Registers in memory of the function, multiplied row by row."""

    def __init__(self, v: Vectors, kind: str) -> None:
        super().__init__(v, kind)
        words = ir.ArrayType(I32, _REGISTERS * TILE_BYTES // WORD_BYTES)
        memory = v.builder.ptrtoint(cgutils.alloca_once(v.builder, words), I64)
        self._memory = Value(v.builder, memory)
        self._registers = v.unchecked
        self._offsets = range(0, ROW_BYTES, v.lanes * WORD_BYTES)

    def configure(self, rows: Value) -> None:
        self._rows = rows

    def load(self, register: int, source: Rows) -> None:
        held = self._held(register)
        with self.v.range(self._count(register)) as row:
            for offset in self._offsets:
                words = self.v.load_words(source.row(row), offset)
                self._registers.store(words, held.row(row), offset)

    def store(self, register: int, out: Rows) -> None:
        held = self._held(register)
        with self.v.range(self._count(register)) as row:
            for offset in self._offsets:
                words = self._registers.load_words(held.row(row), offset)
                self.v.store(words, out.row(row), offset)

    def multiply_add(self, accumulators: int, weights: int) -> None:
        sums, inputs = self._held(accumulators), self._held(INPUTS)
        add = self._add_floats if self.kind == "bfloat16" else self._add_bytes
        with self.v.range(self._rows) as row:
            for offset in self._offsets:
                add(sums.row(row) + offset, inputs.row(row), self._held(weights, offset))

    def release(self) -> None:
        del self._rows

    def _add_bytes(self, sums_ptr: Value, inputs_ptr: Value, weights: Rows) -> None:
        """Emit: int32 sums += unsigned bytes of an input row times signed bytes of weights."""
        v = self._registers

        def add_step(step: Value, total: Value) -> Value:
            inputs = v.splat(v.load_word(v.element(inputs_ptr, step)))
            words = v.load_words(weights.row(step))
            for byte in range(4):
                weight = (words << (24 - 8 * byte)) >> 24
                total = total + (inputs.lshr(8 * byte) & 255) * weight
            return total

        v.store(v.fold(v.scalar(UNIT_STEPS), 1, v.load_words(sums_ptr), add_step), sums_ptr)

    def _add_floats(self, sums_ptr: Value, inputs_ptr: Value, weights: Rows) -> None:
        """Emit: float32 sums += pairs of bfloat16 of an input row times those of weights."""
        v = self._registers

        def add_step(step: Value, chains: list[Value]) -> list[Value]:
            inputs = v.widen_bfloat16(v.splat(v.load_word(v.element(inputs_ptr, step))))
            words = v.widen_bfloat16(v.load_words(weights.row(step)))
            return [
                self._rounded(_flushed(v, a).to_double() * _flushed(v, b).to_double(), chain)
                for a, b, chain in zip(inputs, words, chains, strict=True)
            ]

        zeros = [v.constant(0.0), v.constant(0.0)]
        first, second = v.loop(v.scalar(UNIT_STEPS), 1, zeros, add_step)
        total = self._rounded(first.to_double(), second)
        v.store(self._rounded(total.to_double(), _flushed(v, v.load(sums_ptr))), sums_ptr)

    def _rounded(self, product: Value, total: Value) -> Value:
        """Return product + total, rounded to float32, denormals flushed.

        The product of two bfloat16 is exact in float64. A sum of two numbers of 24 bits that is
        rounded to 53 bits first, as here, rounds to the same float32.
        """
        v = self._registers
        exact = product + total.to_double()
        is_tiny = v.where(exact < 0.0, -exact, exact) < FLUSHED_BELOW
        return v.where(is_tiny, exact * 0.0, exact).to_single()

    def _held(self, register: int, offset: int = 0) -> Rows:
        address = self._memory + (register * TILE_BYTES + offset)
        return Rows(address, self.v.scalar(ROW_BYTES))

    def _count(self, register: int) -> Value:
        return self.v.scalar(UNIT_ROWS) if register in WEIGHTS else self._rows


def _flushed(v: Vectors, x: Value) -> Value:
    """Return float32 x, or a zero of its sign where it is denormal."""
    return v.where(v.magnitude(x) < 2.0**-126, x * 0.0, x)
