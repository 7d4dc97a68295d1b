"""What kernels are compiled for: the width of this processor's vectors, the dot products it has, and the types of weights and cache.

One compilation serves every model: sizes are run-time arguments, and only what is written down here is not.
"""

import os
from dataclasses import dataclass

from llvmlite import binding, ir

from nanovllm.model.kernels.build.codegen import host_cpu

DTYPES = ("float32", "bfloat16")
QUANTIZATIONS = ("int8",)
WEIGHT_TYPES = (*DTYPES, *QUANTIZATIONS)
CACHE_TYPES = ("float32", "bfloat16", "int8")
PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}
"""Numbers of a type in a word of 32 bits."""
CHECKS_ADDRESSES = os.environ.get("NANOVLLM_CHECK", "") not in {"", "0"}
"""Whether every target of this process has `check`. Read once: functions that serve all targets have the check in them or not, too."""


@dataclass(frozen=True, slots=True)
class KernelTarget:
    """A processor.

    Attributes:
        lanes: float32 in a vector register: 16, 8 or 4.
        bfloat16_dot: whether it multiplies pairs of bfloat16 and adds them to a float32 (AVX512_BF16).
        int8_dot: whether it multiplies groups of four bytes and adds them to an int32 (AVX512_VNNI, AVX_VNNI).
        is_x86: whether x86 instructions may be named.
        has_fma: whether it multiplies and adds in one instruction. Where it does not, two are used:
            a fused one would be a call of the C library for each lane.
        nontemporal: whether streams of weights are asked for as read once, which leaves the caches to others: quicker on Zen 5, slower on Zen 4.
        prefetch_next_block: whether the next block of the KV cache is asked for while one is read: quicker on Zen 4, slower on Zen 5.
        check: compile a check of every address into the kernels (bounds.py).
    """

    lanes: int
    bfloat16_dot: bool = False
    int8_dot: bool = False
    is_x86: bool = False
    has_fma: bool = True
    nontemporal: bool = False
    prefetch_next_block: bool = False
    check: bool = CHECKS_ADDRESSES

    @property
    def panel_vectors(self) -> int:
        """Vectors across a panel: 6 rows of sums of so many, the weights and an input must fit the registers."""
        return {16: 4, 8: 2, 4: 4}[self.lanes]

    @property
    def panel_width(self) -> int:
        """Columns of a panel."""
        return self.panel_vectors * self.lanes


@dataclass(frozen=True, slots=True)
class Spec:
    """A processor and the types of weights and cache: what one compilation of the forward pass is for."""

    target: KernelTarget
    weights: str = "float32"
    cache: str = "float32"


def host_target() -> KernelTarget:
    """The processor of this machine, or the one that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES ask Numba to compile for."""
    features = _features()
    is_x86 = binding.get_default_triple().startswith(("x86_64", "i686"))
    if not is_x86 or not {"avx2", "fma"} <= features:
        return KernelTarget(lanes=4, is_x86=is_x86, has_fma=not is_x86 or "fma" in features)
    if not {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= features:
        return KernelTarget(lanes=8, int8_dot="avxvnni" in features, is_x86=True)
    is_zen5 = host_cpu().name == "znver5"
    return KernelTarget(
        lanes=16,
        bfloat16_dot="avx512bf16" in features,
        int8_dot="avx512vnni" in features,
        is_x86=True,
        nontemporal=is_zen5,
        prefetch_next_block=not is_zen5,
    )


def _features() -> set[str]:
    asked = os.environ.get("NUMBA_CPU_FEATURES")
    name = os.environ.get("NUMBA_CPU_NAME")
    if asked is not None:
        return {part[1:] for part in asked.split(",") if part.startswith("+")}
    if name not in {None, "host"}:
        return _features_of(str(name))
    return {feature for feature, has in binding.get_host_cpu_features().items() if has}


def _features_of(processor: str) -> set[str]:
    """The vector features of a processor that is known by name, read off the code that LLVM makes for it."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(cpu=processor, features="")
    found: set[str] = set()
    code = machine.emit_assembly(binding.parse_assembly(str(_multiply_add(16))))
    if "vfmadd" in code:
        found |= {"avx2", "fma"}
    if "zmm" in code:
        found |= {"avx512f", "avx512vl", "avx512bw", "avx512dq"}
    return found


def _multiply_add(lanes: int) -> ir.Module:
    module = ir.Module(name="probe")
    module.triple = binding.get_default_triple()
    kind = ir.VectorType(ir.FloatType(), lanes)
    pointer = kind.as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.load(function.args[0])
    fma = ir.Function(module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{lanes}f32")
    builder.store(builder.call(fma, [value, value, value]), function.args[0])
    builder.ret_void()
    return module
