"""Whether linear layers use the tile unit of this CPU (Intel AMX), found out at the first start.

The unit was programmed from Intel's manual. So it is used only where it has shown the bits of its
NumPy twin (tile_twin.py) on random tiles, and is faster than the vector instructions. Both are
decided for each type of weights, and kept with the compiled kernels. Linux gives a process the
unit's registers only when it asks for them.

Like peak.py, this needs LLVM but not Numba.
"""

import ctypes
import platform
import sys
from collections.abc import Collection, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from nanovllm.model.kernels.build.codegen import (
    AVX512,
    Library,
    LLVMCpu,
    choice_of,
    create_target_machine,
    has_compiler,
    host_cpu,
    llvm,
    this_cpu,
)
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.peak import (
    BFLOAT16_VARIABLE,
    LEAST_GAIN,
    bfloat16_choice,
    instruction,
    keep_findings,
    measure_by_turns,
    measure_spin,
)
from nanovllm.model.kernels.build.tile_twin import TILE_BYTES, configuration, multiply_add

AMX_VARIABLE = "NANOVLLM_AMX"
_CHOICES = ("0", "1")
FEATURES = {
    "bfloat16": {"amx-tile", "amx-bf16", "avx512bf16", *AVX512},
    "int8": {"amx-tile", "amx-int8", "avx512vnni", *AVX512},
}
"""What a CPU has that uses tiles of each type of weights, by LLVM's names. Every CPU with the unit
has the vector instructions too, but a hypervisor may hide them."""
INSTRUCTIONS = {"bfloat16": "tdpbf16ps", "int8": "tdpbusd"}
_ACCUMULATORS = 4
_OPERATIONS = 2 * 16 * 16 * 16  # of an instruction on whole tiles, for each number in a word
_HEIGHTS, _TRIALS = (16, 7, 1), 8
_VECTORS = {"bfloat16": ("bfloat16", "float32"), "int8": ("int8",)}
_LANES = 16
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64


def usable_tiles(cpu: LLVMCpu, weights: Collection[str] = tuple(FEATURES)) -> frozenset[str]:
    """Return the types of `weights` for which kernels should use the tile unit.

    Raises ValueError if NANOVLLM_AMX is not valid, or is 1 where the unit cannot be used for any
    type of weights that has tiles.
    """
    refusals, choice = tile_refusals(cpu, weights), choice_of(AMX_VARIABLE, *_CHOICES)
    has_tiles = not FEATURES.keys().isdisjoint(weights)
    if choice == "1" and has_tiles and not any(why in _ALLOWED for why in refusals.values()):
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in refusals.items())
        raise ValueError(
            f"{AMX_VARIABLE} is 1, but {reasons or 'this CPU, or its hypervisor, shows no AMX'}; "
            "unset it"
        )
    return frozenset(kind for kind, reason in refusals.items() if not reason)


def tile_refusals(cpu: LLVMCpu, weights: Collection[str] = tuple(FEATURES)) -> Mapping[str, str]:
    """Return the types of `weights` of which this CPU has tiles.

    Each has the reason why they are not used, or "".
    """
    # Another CPU's code, which this one cannot run, has shown no bits.
    both = set(cpu.features.split(",")) & set(this_cpu().features.split(","))
    features = {feature.removeprefix("+") for feature in both}
    kinds = [kind for kind in FEATURES if kind in weights and FEATURES[kind] <= features]
    if not kinds:
        return {}
    if not has_compiler():
        return dict.fromkeys(kinds, "Numba, which compiles them, is not installed")
    if choice_of(AMX_VARIABLE, *_CHOICES) == "0":
        return dict.fromkeys(kinds, f"{AMX_VARIABLE} is 0")
    if not request_permission():
        return dict.fromkeys(kinds, "the operating system does not permit them")
    return {kind: _refusal(kind) for kind in kinds}


_BFLOAT16_IS_SET = f"{BFLOAT16_VARIABLE} is set"
_ALLOWED = ("", _BFLOAT16_IS_SET)


def _refusal(kind: str) -> str:
    if kind == "bfloat16" and bfloat16_choice():
        return _BFLOAT16_IS_SET
    found = _findings(kind)
    if not found["same_bits"]:
        return "their bits are not those that Intel documents"
    is_faster = found["tiles"] >= LEAST_GAIN * found["vectors"]
    return "" if is_faster or choice_of(AMX_VARIABLE, *_CHOICES) == "1" else "vectors are as fast"


@cache
def request_permission() -> bool:
    """Ask Linux for the unit's registers, for all threads and children of this process."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    system_call = ctypes.CDLL(None).syscall
    system_call.argtypes = [ctypes.c_long] * 3
    return bool(system_call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@cache
def _findings(kind: str) -> Mapping[str, Any]:
    """Return whether the bits are the twin's, and the speed of tiles and of vectors.

    They are those of the first start, if they could be kept.
    """
    return keep_findings(f"tiles of {kind}", partial(_find, kind))


def _find(kind: str) -> dict[str, Any]:
    if not has_same_bits(kind):
        return {"same_bits": False}
    speeds = measure_by_turns(_VECTORS[kind], _LANES, tiles=lambda: measure_tiles(kind))
    tiles = speeds.pop("tiles")
    return {"same_bits": True, "tiles": tiles, "vectors": max(speeds.values())}


def has_same_bits(kind: str) -> bool:
    """Return whether the unit computes the bits of its twin, on random tiles."""
    multiply = Library(emit_tiles(kind), ["multiply"]).functions["multiply"]
    random = np.random.default_rng(0)
    for rows in _HEIGHTS * _TRIALS:
        inputs, weights, accumulators = random_tiles(kind, rows, random)
        expected = multiply_add(kind, accumulators, inputs, weights)
        registers = aligned_zeros(4 * 16 * 16).view(np.uint32).reshape(4, 16, 16)
        registers[0, 0] = np.frombuffer(configuration(rows), dtype=np.uint32)
        registers[1, :rows], registers[2], registers[3, :rows] = inputs, weights, accumulators
        multiply(registers.ctypes.data, 0)
        if not np.array_equal(registers[3, :rows], expected):
            return False
    return True


def random_tiles(
    kind: str, rows: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs [rows, 16], weights [16, 16] and accumulators [rows, 16], all as uint32.

    Of bfloat16, most numbers are of similar size, so that their sums are rounded; some, and with
    them some sums, are denormal.
    """
    words = [random.integers(0, 1 << 32, (n, 16), dtype=np.uint32) for n in (rows, 16, rows)]
    if kind == "int8":
        return words[0], words[1], words[2]
    scale = random.choice([2.0**-66, 2.0**-62, 1.0])
    numbers = [
        random.standard_normal((n, width)) * 2.0 ** random.integers(-4, 5, (n, width)) * factor
        for n, width, factor in ((rows, 32, scale), (16, 32, scale), (rows, 16, scale * scale))
    ]
    floats = [np.ascontiguousarray(part.astype(np.float32)) for part in numbers]
    for part in floats[:2]:
        part[random.random(part.shape) < 0.05] = 2.0**-130
    inputs, weights = (
        (part.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.uint32)
        for part in floats[:2]
    )
    return inputs, weights, floats[2].view(np.uint32)


def measure_tiles(kind: str, threads: int = 1) -> float:
    """Return multiplications and additions a second of `threads` threads together."""
    spin = Library(emit_tiles(kind), ["spin"]).functions["spin"]
    return measure_spin(
        spin, _ACCUMULATORS * _OPERATIONS * instruction(kind, _LANES).per_word, threads
    )


def emit_tiles(kind: str, cpu: LLVMCpu | None = None) -> bytes:
    """Return the object file of `multiply` and `spin` for a CPU, by default this one."""
    module = llvm().parse_assembly(_assembly(kind))
    return bytes(create_target_machine(cpu or host_cpu()).emit_object(module))


def _assembly(kind: str) -> str:
    """Return LLVM code of multiply(address, _) -> 0 and spin(count, _) -> 0.

    At the address of `multiply` are the configuration and, 1 KiB apart, inputs, weights and
    accumulators, to which it adds. `spin` multiplies zeros `count` times for each accumulator.
    """
    name = INSTRUCTIONS[kind]
    table = "".join(f"\\{byte:02x}" for byte in configuration(16))
    accumulators = range(_ACCUMULATORS)
    zeros = "\n  ".join(f"call void @llvm.x86.tilezero(i8 {n})" for n in (*accumulators, 4, 5))
    products = "\n  ".join(f"call void @llvm.x86.{name}(i8 {n}, i8 4, i8 5)" for n in accumulators)
    return f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.{name}(i8, i8, i8)
@configuration = internal constant [64 x i8] c"{table}"
define i32 @multiply(i64 %address, i64 %unused) {{
  %start = inttoptr i64 %address to ptr
  %inputs = getelementptr i8, ptr %start, i64 {TILE_BYTES}
  %weights = getelementptr i8, ptr %start, i64 {2 * TILE_BYTES}
  %sums = getelementptr i8, ptr %start, i64 {3 * TILE_BYTES}
  call void @llvm.x86.ldtilecfg(ptr %start)
  call void @llvm.x86.tileloadd64(i8 0, ptr %sums, i64 64)
  call void @llvm.x86.tileloadd64(i8 4, ptr %inputs, i64 64)
  call void @llvm.x86.tileloadd64(i8 5, ptr %weights, i64 64)
  call void @llvm.x86.{name}(i8 0, i8 4, i8 5)
  call void @llvm.x86.tilestored64(i8 0, ptr %sums, i64 64)
  call void @llvm.x86.tilerelease()
  ret i32 0
}}
define i32 @spin(i64 %count, i64 %unused) {{
entry:
  call void @llvm.x86.ldtilecfg(ptr @configuration)
  {zeros}
  br label %loop
loop:
  %index = phi i64 [ 0, %entry ], [ %next, %loop ]
  {products}
  %next = add i64 %index, 1
  %continues = icmp slt i64 %next, %count
  br i1 %continues, label %loop, label %end
end:
  call void @llvm.x86.tilerelease()
  ret i32 0
}}
"""
