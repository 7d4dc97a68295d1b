"""Targets whose code this CPU can run: its own, and those of lesser CPUs."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from nanovllm.model.kernels.build.amx import request_permission, tile_refusals
from nanovllm.model.kernels.build.codegen import Library, host_cpu
from nanovllm.model.kernels.build.object_cache import user_cache
from nanovllm.model.kernels.build.target import KernelTarget, Spec, has_bfloat16_dot, host_target
from nanovllm.model.kernels.library import cache_key, load_library

HOST = host_target()
_DOTS = replace(
    HOST.without_tiles, bfloat16_dot=has_bfloat16_dot(host_cpu())
)  # even where it is slower
TILES = replace(HOST, bfloat16_tiles=True, int8_tiles=True, emulates_tiles=True)
_PLAIN = replace(HOST.without_tiles, bfloat16_dot=False, int8_dot=False)
_NARROWER = [replace(_PLAIN, lanes=lanes) for lanes in (16, 8, 4) if lanes <= HOST.lanes]

TARGETS = list(dict.fromkeys([HOST, _DOTS, *_NARROWER, KernelTarget(lanes=4)]))
"""This CPU, then each of its vector widths without dot products, then the generic target."""

_SHOWN = tile_refusals(host_cpu()) if request_permission() else {}
_UNIT = replace(HOST, bfloat16_tiles="bfloat16" in _SHOWN, int8_tiles="int8" in _SHOWN)
TILE_TARGETS = [TILES, _UNIT]
"""Linear layers on an emulated tile unit, and on that of this CPU, if it shows one."""

WIDTHS = list({target.lanes: target for target in reversed(TARGETS)}.values())[::-1]
"""Each vector width once: targets of one width differ only in matmuls of bfloat16 and int8."""

_OLDER_X86 = {
    "haswell": KernelTarget(lanes=8, is_x86=True),
    "x86-64": KernelTarget(lanes=4, is_x86=True, has_fma=False),
}
OLDER = {
    name: target for name, target in _OLDER_X86.items() if HOST.is_x86 and target.lanes < HOST.lanes
}
"""CPUs with shorter vectors than this one, by LLVM's names."""

WHOLE_TARGETS = list(dict.fromkeys([HOST, *OLDER.values(), KernelTarget(lanes=4)]))
"""For kernels that take long to compile: this CPU, older ones, and the generic target."""

_COMPILE = """
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.build.target import Spec, host_target
load_library(Spec(host_target()))
"""


def set_cpu_name(patch: pytest.MonkeyPatch, name: str) -> None:
    """Compile kernels for a CPU by LLVM's name."""
    patch.setenv("NUMBA_CPU_NAME", name)
    patch.delenv("NUMBA_CPU_FEATURES", raising=False)  # they take precedence over the name


def load_whole(target: KernelTarget) -> Library:
    """Return the library for float32, from this user's cache or compiled.

    Code for an older CPU is compiled by its name in another process, because Numba has initialised
    this CPU here.
    """
    spec = Spec(target)
    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name, older in OLDER.items() if older == target):
            set_cpu_name(patch, name)
            if user_cache().load(cache_key(spec, host_cpu())) is None:
                subprocess.run([sys.executable, "-c", _COMPILE], check=True, env=os.environ)
        return load_library(spec)


def name_of(target: KernelTarget) -> str:
    """Return a short name of a target."""
    dots = f"{'-dot' * target.bfloat16_dot}{'-bytes' * target.int8_dot}"
    return f"{target.lanes}{'-x86' * target.is_x86}{dots}"
