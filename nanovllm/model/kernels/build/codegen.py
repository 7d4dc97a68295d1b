"""The processor that machine code is made for, and how machine code becomes functions of this process.

LLVM itself is enough for both; Numba, which takes longer to import than a model to load, is only needed to compile.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import CFUNCTYPE, c_int32, c_int64
from dataclasses import dataclass
from typing import Any

from llvmlite import binding


@dataclass(frozen=True, slots=True)
class LLVMCpu:
    """A processor in LLVM's words.

    Attributes:
        triple: instruction set, maker and operating system.
        name: its model.
        features: the instructions that it has and has not: "+avx2,-avx512f,...".
    """

    triple: str
    name: str
    features: str


def host_cpu() -> LLVMCpu:
    """The processor of this machine, or the one that NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name in its place."""
    triple = binding.get_process_triple()
    name, features = os.environ.get("NUMBA_CPU_NAME", "host"), os.environ.get("NUMBA_CPU_FEATURES")
    if name != "host":
        return LLVMCpu(triple, name, features or "")
    return LLVMCpu(
        triple,
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten() if features is None else features,
    )


def create_target_machine(processor: LLVMCpu) -> Any:
    """LLVM's code generator for code that is loaded into this process."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(processor.triple)
    relocation = "static" if target.name.startswith("x86") else "default"
    return target.create_target_machine(
        cpu=processor.name,
        features=processor.features,
        opt=3,
        reloc=relocation,
        codemodel="jitdefault",
        jit=True,
    )


def load_object(image: bytes, names: Iterable[str]) -> dict[str, int]:
    """Load an object file into this process; returns the addresses of its functions of these names.

    It stays loaded until the process ends, since a thread may be about to return from it.
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
"""Releases the interpreter's lock during the call."""


class Library:
    """Machine code in this process; it stays until the process ends."""

    def __init__(self, image: bytes, names: Sequence[str]) -> None:
        """Load an object file that has functions of these names."""
        self.addresses: Mapping[str, int] = load_object(image, names)
        self.functions: Mapping[str, Callable[[int, int], int]] = {
            name: PROTOTYPE(address) for name, address in self.addresses.items()
        }
