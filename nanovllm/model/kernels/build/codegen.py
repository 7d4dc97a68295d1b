"""The CPU that machine code is generated for, and loading of machine code into this process.

Both need LLVM only. Numba is imported only to compile, because its import takes longer than loading
a model.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import CFUNCTYPE, c_int32, c_int64
from dataclasses import dataclass
from typing import Any

from llvmlite import binding


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


def host_cpu() -> LLVMCpu:
    """Return this machine's CPU, or the one that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name."""
    triple = binding.get_process_triple()
    name, features = os.environ.get("NUMBA_CPU_NAME", "host"), os.environ.get("NUMBA_CPU_FEATURES")
    if name != "host":
        return LLVMCpu(triple, name, features or "")
    return LLVMCpu(
        triple,
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten() if features is None else features,
    )


def create_target_machine(cpu: LLVMCpu) -> Any:
    """Return LLVM's code generator for code that is loaded into this process."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(cpu.triple)
    relocation = "static" if target.name.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=cpu.name,
        features=cpu.features,
        opt=3,
        reloc=relocation,
        codemodel="jitdefault",
        jit=True,
    )


def load_object(image: bytes, names: Iterable[str]) -> dict[str, int]:
    """Load an object file into this process and return the addresses of its functions `names`.

    The code stays loaded until the process ends: a thread may still be about to return from it.
    """
    engine = binding.create_mcjit_compiler(
        binding.parse_assembly(""), create_target_machine(host_cpu())
    )
    engine.add_object_file(binding.ObjectFileRef.from_data(image))
    engine.finalize_object()
    addresses = {name: engine.get_function_address(name) for name in names}
    engine.detach()
    return addresses


PROTOTYPE = CFUNCTYPE(c_int32, c_int64, c_int64)
"""A compiled entry as ctypes calls it, without the GIL: function(address, thread) -> status."""


class Library:
    """Machine code that is loaded until the process ends."""

    def __init__(self, image: bytes, names: Sequence[str]) -> None:
        """Load an object file that defines the functions `names`."""
        self.addresses: Mapping[str, int] = load_object(image, names)
        self.functions: Mapping[str, Callable[[int, int], int]] = {
            name: PROTOTYPE(address) for name, address in self.addresses.items()
        }
