"""What kernels are compiled for: an instruction set, and the data types of weights and KV cache.

One compilation serves every model, because all sizes are run-time arguments.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache

from nanovllm.model.kernels.build.amx import usable_tiles
from nanovllm.model.kernels.build.codegen import (
    AVX2,
    AVX512,
    LLVMCpu,
    has_compiler,
    host_cpu,
    llvm,
)
from nanovllm.model.kernels.build.packing import panel_steps, round_up
from nanovllm.model.kernels.build.peak import (
    BFLOAT16_VARIABLE,
    bfloat16_choice,
    is_bfloat16_dot_faster,
)

DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("int8",)
WEIGHTS = (*DTYPES, *QUANTIZATIONS)
CACHE_TYPES = ("float32", "bfloat16", "int8")
PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Values of a type of weights that a 32-bit word holds."""
INPUTS_PER_WORD = {**PER_WORD, "int16": 2}
"""Values of a type of input rows that a 32-bit word holds."""
UNIT_STEPS = 16
"""Steps of a panel that one instruction of the tile unit takes (simd/tile_unit.py)."""
CHECKS_ADDRESSES = os.environ.get("NANOVLLM_CHECK", "") not in {"", "0"}
"""The default of `KernelTarget.check`. Read once at import: functions that all targets share are
compiled with the check or without it."""


@dataclass(frozen=True, slots=True)
class KernelTarget:
    """An instruction set, and the prefetches that suit the CPU.

    Attributes:
        lanes: float32 values in a vector register: 16, 8 or 4.
        bfloat16_dot: uses a dot product of bfloat16 pairs with float32 sums (AVX512_BF16,
            bfdot of ARM).
        int8_dot: uses a dot product of four bytes with int32 sums (AVX512_VNNI, AVX_VNNI, sdot of
            ARM).
        bfloat16_tiles: linear layers with bfloat16 weights use the tile unit (AMX_BF16).
        int8_tiles: linear layers with int8 weights use it (AMX_INT8).
        emulates_tiles: emulate the tile unit by vectors, to the same bits: for tests.
        is_x86: x86 intrinsics may be used.
        has_fma: has fused multiply-add. Without it a multiplication and an addition are emitted,
            because LLVM would call the C library's fmaf for each lane.
        nontemporal: prefetch streams of weights with a non-temporal hint, which keeps them out of
            the outer caches: faster on Zen 5, slower on Zen 4.
        prefetch_next_block: prefetch the next block of the KV cache while one is read: faster on
            Zen 4, slower on Zen 5.
        check: compile a check of every address into the kernels (bounds.py).
    """

    lanes: int
    bfloat16_dot: bool = False
    int8_dot: bool = False
    bfloat16_tiles: bool = False
    int8_tiles: bool = False
    emulates_tiles: bool = False
    is_x86: bool = False
    has_fma: bool = True
    nontemporal: bool = False
    prefetch_next_block: bool = False
    check: bool = CHECKS_ADDRESSES

    def input_type(self, kind: str) -> str:
        """Return the type in which matmuls with weights of type `kind` take their input rows.

        A dot product and the tile unit take both in the same type. Where bfloat16 weights are
        widened to float32 instead, the input rows are float32 too, without rounding; where int8
        weights are widened to int16, so are the bytes of the input rows.
        """
        if self.uses_tiles(kind):
            return kind
        if kind == "bfloat16" and not self.bfloat16_dot:
            return "float32"
        return "int16" if kind == "int8" and self.is_x86 and not self.int8_dot else kind

    @property
    def int8_offset(self) -> int:
        """What is subtracted from the bytes of input rows and from their zero points.

        They are unsigned, except for the dot product of ARM, which multiplies signed bytes. Where
        both are smaller by the same number, their differences are the same.
        """
        is_signed = self.int8_dot and not self.is_x86 and not self.uses_tiles("int8")
        return 128 if is_signed else 0

    def uses_tiles(self, kind: str) -> bool:
        """Return whether linear layers with weights of type `kind` use the tile unit."""
        return {"bfloat16": self.bfloat16_tiles, "int8": self.int8_tiles}.get(kind, False)

    @property
    def without_tiles(self) -> "KernelTarget":
        """The same target without the tile unit, as attention uses it."""
        return replace(self, bfloat16_tiles=False, int8_tiles=False)

    def panel_steps(self, kind: str, d_in: int) -> int:
        """Return the words down a panel of weights of type `kind`: whole tiles for the unit."""
        steps = panel_steps(d_in, PER_WORD[kind])
        return round_up(steps, UNIT_STEPS) if self.uses_tiles(kind) else steps

    def row_block(self, kind: str) -> int:
        """Return how many rows of a matmul are taken together: they stay in a core's own cache.

        Where panels are widened in memory, more rows share the work; the tile unit is so fast that
        few rows would wait for their panel. CPUs with AVX-512 have a cache for them.
        """
        shares = self.input_type(kind) != kind or self.uses_tiles(kind)
        return 192 if self.lanes == 16 and shares else 96

    @property
    def panel_vectors(self) -> int:
        """Vectors across a panel: accumulators of 6 rows, weights and an input fit in registers."""
        return {16: 4, 8: 2, 4: 4}[self.lanes]

    @property
    def panel_width(self) -> int:
        """Columns of a panel."""
        return self.panel_vectors * self.lanes


@dataclass(frozen=True, slots=True)
class Spec:
    """What one compilation of the forward pass is for: a target, types of weights and cache."""

    target: KernelTarget
    weights: str = "float32"
    cache: str = "float32"

    @property
    def inputs(self) -> str:
        """Type of the input rows of linear layers."""
        return self.target.input_type(self.weights)

    @property
    def attention_inputs(self) -> str:
        """Type of the queries and the attention weights; an int8 cache is widened to float32."""
        if self.cache == "int8":
            return "float32"
        return self.target.without_tiles.input_type(self.cache)

    @property
    def essential(self) -> "Spec":
        """The same compilation, without the instructions that its types do not use."""
        types = {self.weights, self.cache}
        target = replace(
            self.target,
            bfloat16_dot=self.target.bfloat16_dot and "bfloat16" in types,
            int8_dot=self.target.int8_dot and self.weights == "int8",
            bfloat16_tiles=self.target.bfloat16_tiles and self.weights == "bfloat16",
            int8_tiles=self.target.int8_tiles and self.weights == "int8",
        )
        return replace(self, target=target)


def host_spec(weights: str = "float32", cache: str = "float32") -> Spec:
    """Return what is compiled for these types on the CPU that `host_cpu` names.

    Raises ValueError as `host_target` does.
    """
    return Spec(host_target((weights,), cache), weights, cache).essential


VECTORS = {16: (*AVX2, *AVX512), 8: AVX2, 4: ("neon",)}
BFLOAT16_DOT = {16: "avx512bf16", 4: "bf16"}
INT8_DOT = {16: "avx512vnni", 8: "avxvnni", 4: "dotprod"}
"""LLVM's names of what kernels need, by lanes: x86 with 16 or 8, ARM with 4."""


def host_target(weights: Collection[str] = WEIGHTS, cache: str = "bfloat16") -> KernelTarget:
    """Return the target of the CPU that `host_cpu` names.

    Args:
        weights, cache: types for which the first start finds the faster instructions. Those that
            only other types use stay unknown, as if the CPU had none.

    Raises ValueError if NANOVLLM_BFLOAT16 or NANOVLLM_AMX is not valid, or asks for what the CPU
    lacks.
    """
    cpu, choice = host_cpu(), bfloat16_choice()
    features, has_dot = _features(cpu), has_bfloat16_dot(cpu)
    if choice == "dot" and not has_dot:
        raise ValueError(
            f"{BFLOAT16_VARIABLE} is dot, but this CPU has no dot products of bfloat16; unset it"
        )
    is_x86 = cpu.triple.startswith(("x86_64", "i686"))
    lanes = next((n for n in (16, 8) if is_x86 and features.issuperset(VECTORS[n])), 4)
    is_wide, tiles = lanes == 16, usable_tiles(cpu, weights)
    is_asked = "bfloat16" in {*weights, cache} and has_dot and choice != "float32"
    is_zen5 = cpu.name == "znver5"
    return KernelTarget(
        lanes=lanes,
        bfloat16_dot=is_asked and (choice == "dot" or is_bfloat16_dot_faster(cpu, lanes)),
        int8_dot=INT8_DOT[lanes] in features,
        bfloat16_tiles=is_wide and "bfloat16" in tiles,
        int8_tiles=is_wide and "int8" in tiles,
        is_x86=is_x86,
        has_fma=not is_x86 or "fma" in features,
        nontemporal=is_wide and is_zen5,
        prefetch_next_block=is_wide and not is_zen5,
    )


def has_bfloat16_dot(cpu: LLVMCpu) -> bool:
    """Return whether a CPU has dot products of bfloat16, be they faster or not."""
    features = _features(cpu)
    return features.issuperset({BFLOAT16_DOT[16], *AVX512}) or BFLOAT16_DOT[4] in features


def _features(cpu: LLVMCpu) -> frozenset[str]:
    is_arm = cpu.triple.startswith(("aarch64", "arm64"))
    if not cpu.features or (is_arm and has_compiler()):
        return features_of(cpu)
    return frozenset(name[1:] for name in cpu.features.split(",") if name.startswith("+"))


_PROBE = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define <16 x float> @multiply_add(<16 x float> %a) {
  %sum = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)
  ret <16 x float> %sum
}
define i32 @dot(<16 x i8> %a, <16 x i8> %b) {
  %wide_a = sext <16 x i8> %a to <16 x i32>
  %wide_b = sext <16 x i8> %b to <16 x i32>
  %products = mul <16 x i32> %wide_a, %wide_b
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}
define <4 x bfloat> @round(<4 x float> %a) {
  %rounded = fptrunc <4 x float> %a to <4 x bfloat>
  ret <4 x bfloat> %rounded
}
"""
_FEATURES = {
    "vfmadd": AVX2,
    "zmm": AVX512,
    "sdot": (INT8_DOT[4],),
    "bfcvtn": (BFLOAT16_DOT[4],),
}
"""Features by what they put into the assembly of _PROBE."""


@cache
def features_of(cpu: LLVMCpu) -> frozenset[str]:
    """Return the vector features of a CPU, inferred from the code that LLVM emits for it."""
    binding = llvm()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(cpu.triple).create_target_machine(
        cpu=cpu.name, features=cpu.features
    )
    code = machine.emit_assembly(binding.parse_assembly(_PROBE))
    return frozenset[str]().union(*(names for word, names in _FEATURES.items() if word in code))
