"""Processors that kernels can be compiled for and run on here: this one, and lesser ones that it understands."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from nanovllm.model.kernels.build.codegen import Library, host_cpu
from nanovllm.model.kernels.build.object_cache import user_cache
from nanovllm.model.kernels.build.target import KernelTarget, Spec, host_target
from nanovllm.model.kernels.library import cache_key, load_library

HOST = host_target()
_PLAIN = replace(HOST, bfloat16_dot=False, int8_dot=False)
_NARROWER = [replace(_PLAIN, lanes=lanes) for lanes in (16, 8, 4) if lanes <= HOST.lanes]

TARGETS = list(dict.fromkeys([HOST, *_NARROWER, KernelTarget(lanes=4)]))
"""This processor, then every vector width that it has without its dot products, then what no processor in particular has."""

WIDTHS = list({target.lanes: target for target in reversed(TARGETS)}.values())[::-1]
"""Each vector width once: all but a product of bfloat16 or of bytes is the same for targets of one width."""

_OLDER_X86 = {
    "haswell": KernelTarget(lanes=8, is_x86=True),
    "x86-64": KernelTarget(lanes=4, is_x86=True, has_fma=False),
}
OLDER = {
    name: target for name, target in _OLDER_X86.items() if HOST.is_x86 and target.lanes < HOST.lanes
}
"""Processors with shorter vectors than this one, by LLVM's names."""

WHOLE_TARGETS = list(dict.fromkeys([HOST, *OLDER.values(), KernelTarget(lanes=4)]))
"""For what takes long to compile: this processor, older ones, and none in particular."""

_COMPILE = """
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.build.target import Spec, host_target
load_library(Spec(host_target()))
"""


def name_processor(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make a processor's name the one that kernels are compiled for."""
    patch.setenv("NUMBA_CPU_NAME", name)
    patch.delenv("NUMBA_CPU_FEATURES", raising=False)  # they would go before the name


def load_whole(target: KernelTarget) -> Library:
    """Return the library for float32, from this user's cache or compiled.

    The code for an older processor is compiled for it by name, in a process of its own: here Numba
    has begun with this processor.
    """
    spec = Spec(target)
    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name, older in OLDER.items() if older == target):
            name_processor(patch, name)
            if user_cache().load(cache_key(spec, host_cpu())) is None:
                subprocess.run([sys.executable, "-c", _COMPILE], check=True, env=os.environ)
        return load_library(spec)
