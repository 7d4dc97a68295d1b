"""The CPU that machine code is generated for, and loading of machine code into this process.

Both need LLVM only. Numba is imported only to compile, because its import takes longer than loading
a model. Shared objects of a wheel (shipped.py) are loaded without LLVM, which may be missing then.
"""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import CDLL, CFUNCTYPE, c_int32, c_int64, c_ulong, c_void_p, cast
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanovllm.errors import KernelError

CPU_INFO = Path("/proc/cpuinfo")
AVX2 = ("avx2", "fma")
AVX512 = ("avx512f", "avx512vl", "avx512bw", "avx512dq")
_ZEN5_FAMILY = "26"
_ARM_BITS = {"dotprod": (16, 20), "bf16": (26, 14)}
"""Where Linux lists features of ARM: the key of getauxval, and the number of the bit."""


def choice_of(variable: str, *choices: str) -> str:
    """Return what an environment variable chooses; "" if it is not set.

    Raises ValueError if it is not one of `choices`.
    """
    choice = os.environ.get(variable, "")
    if choice and choice not in choices:
        raise ValueError(f"{variable} is {choice!r}; set it to {' or '.join(choices)}, or unset it")
    return choice


@dataclass(frozen=True, slots=True)
class LLVMCpu:
    """A CPU as LLVM names it.

    Attributes:
        triple: architecture, vendor and operating system.
        name: its model, such as "znver5".
        features: instruction sets that it has and lacks: "+avx2,-avx512f,...".
    """

    triple: str
    name: str
    features: str


@cache
def has_compiler() -> bool:
    """Return whether Numba, and with it LLVM, is installed."""
    return all(map(find_spec, ("llvmlite", "numba")))


def llvm() -> Any:
    """Import LLVM; raise KernelError if it is not installed."""
    if not has_compiler():
        numba = "numba"
        with suppress(PackageNotFoundError):  # the source tree is on the path
            lines = requires("nanovllm") or []
            numba = next(line for line in lines if line.startswith("numba")).partition(";")[0]
        raise KernelError(
            "the installed kernels are not for this CPU or setting, and Numba, which compiles "
            f"others, is missing: pip install '{numba}', or choose the backend numpy"
        )
    from llvmlite import binding  # noqa: PLC0415 - may be missing

    return binding


def host_cpu() -> LLVMCpu:
    """Return the CPU that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name, by default this machine's."""
    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if name is None and features is None:
        return this_cpu()
    triple = llvm().get_process_triple()
    if name not in {None, "host"}:
        return LLVMCpu(triple, name, features or "")
    cpu = this_cpu()
    return cpu if features is None else replace(cpu, features=features)


def this_cpu() -> LLVMCpu:
    """Return this machine's CPU; without LLVM, as far as shared objects of a wheel need it.

    LLVM infers dot products of ARM from the name of the CPU alone, which it may not know.
    """
    if not has_compiler():
        return cpu_of_linux()
    binding = llvm()
    triple, features = binding.get_process_triple(), binding.get_host_cpu_features().flatten()
    if triple.startswith("aarch64") and sys.platform == "linux":
        features = f"{features},{_arm_features()}".strip(",")
    return LLVMCpu(triple, binding.get_host_cpu_name(), features)


def _arm_features() -> str:
    look_up = CDLL(None).getauxval
    look_up.argtypes, look_up.restype = [c_ulong], c_ulong
    signs = {
        name: "+" if look_up(key) >> bit & 1 else "-" for name, (key, bit) in _ARM_BITS.items()
    }
    return ",".join(sign + name for name, sign in signs.items())


@cache
def cpu_of_linux() -> LLVMCpu:
    """Return the CPU that Linux describes; without features elsewhere, so that LLVM is needed.

    On x86 this is /proc/cpuinfo, not the CPU's own answer (CPUID): that takes machine code in
    memory of this process, which hardened systems refuse, and says nothing of what the system
    disables. Only an emulator of x86 on x86 may show more than it has; LLVM asks the CPU there.
    """
    triple = f"{platform.machine()}-unknown-{sys.platform}"
    if triple.startswith("aarch64-unknown-linux"):
        return LLVMCpu(triple, "generic", f"+neon,{_arm_features()}")
    fields: dict[str, str] = {}
    with suppress(OSError):
        for line in CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    is_zen5 = (fields.get("vendor_id"), fields.get("cpu family")) == ("AuthenticAMD", _ZEN5_FAMILY)
    features = [
        f"+{name.replace('amx_', 'amx-').replace('_', '')}"
        for name in fields.get("flags", "").split()
    ]
    return LLVMCpu(triple, "znver5" if is_zen5 else "generic", ",".join(sorted(features)))


def create_target_machine(cpu: LLVMCpu, *, is_shared: bool = False) -> Any:
    """Return LLVM's code generator for code that is loaded into this process.

    Args:
        cpu: what the code is for.
        is_shared: for a shared object, which a linker makes and any process can load.
    """
    binding = llvm()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(cpu.triple)
    relocation = "static" if target.name.startswith("x86") else "default"
    if is_shared:
        return target.create_target_machine(
            cpu=cpu.name, features=cpu.features, opt=3, reloc="pic", codemodel="small"
        )
    return target.create_target_machine(
        cpu=cpu.name,
        features=cpu.features,
        opt=3,
        reloc=relocation,
        codemodel="jitdefault",
        jit=True,
    )


PROTOTYPE = CFUNCTYPE(c_int32, c_int64, c_int64)
"""A compiled entry as ctypes calls it, without the GIL: function(address, thread) -> status."""


class Library:
    """Machine code that is loaded until the process ends: a thread may be about to return to it."""

    def __init__(self, image: bytes | Path, names: Sequence[str]) -> None:
        """Load an object file, or a shared object at a path, that defines the functions `names`.

        Raises OSError if the shared object cannot be loaded.
        """
        self.addresses: Mapping[str, int]
        if isinstance(image, Path):
            loaded = CDLL(str(image))
            self.addresses = {name: cast(loaded[name], c_void_p).value or 0 for name in names}
        else:
            binding, machine = llvm(), create_target_machine(host_cpu())
            engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
            engine.add_object_file(binding.ObjectFileRef.from_data(image))
            engine.finalize_object()
            self.addresses = {name: engine.get_function_address(name) for name in names}
            engine.detach()
        self.functions: Mapping[str, Callable[[int, int], int]] = {
            name: PROTOTYPE(address) for name, address in self.addresses.items()
        }
