"""`nanovllm env`: print versions, processor, memory, folders and variables for a bug report."""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanovllm.cli.environment import VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.parser import set_up
from nanovllm.cli.table import print_rows
from nanovllm.config import format_bytes
from nanovllm.errors import KernelError, counted, printable

_DESCRIPTION = """
Show what a bug report needs: versions, processor, memory, folders and environment variables. Keys
and tokens are not shown.
"""
_PACKAGES = (
    "numpy", "numba", "llvmlite", "tokenizers", "safetensors", "huggingface-hub", "fastapi",
    "uvicorn", "h11", "pydantic", "jinja2", "llguidance", "tqdm", "openai", "torch", "transformers",
)  # fmt: skip
_ACCOUNT = re.compile(r"(?:(?<=//)|^(?!\w+://))[^/?#]*@")
"""User name and password in the URL of a mirror, with or without a scheme."""
_PUBLIC_PREFIXES = ("NUMBA_", "OMP_", "OPENBLAS_", "MKL_")


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options, of which there are none."""
    set_up(parser, run, "", _DESCRIPTION, tuple(VARIABLES))


def run(parsed: argparse.Namespace) -> int:
    """Print the report."""
    print_rows({**_machine(), **_folders(), **_versions()}, 16)
    variables = shown_variables(os.environ)
    print("\nenvironment variables:" + ("" if variables else " none"))
    for name, value in variables.items():
        print(f"  {name}={value}")
    return 0


def _machine() -> dict[str, str]:
    with ended_by_interrupts():
        from nanovllm.cli.bench.report import describe_machine
        from nanovllm.cli.numa import describe_nodes
        from nanovllm.model.kernels.build.codegen import host_cpu
        from nanovllm.model.machine import default_threads, usable_cpus

    machine = describe_machine()
    try:
        cpu, instructions = f" ({host_cpu().name})", _instructions()
    except (KernelError, ValueError) as error:
        cpu, instructions = "", str(error)
    return {
        "nanovllm": f"{machine['nanovllm']}, {Path(__file__).parents[1]}",
        "Python": f"{machine['python']}, {sys.executable}",
        "system": machine["os"],
        "processor": f"{machine['cpu']}{cpu}",
        "instructions": instructions,
        "processors": f"{usable_cpus()} usable, {counted(default_threads(), 'thread')} by default",
        "NUMA nodes": describe_nodes(),
        "memory": _memory(),
    }


def _instructions() -> str:
    """Return the instructions that kernels use, and why they do not use others."""
    from nanovllm.model.kernels.build.amx import tile_refusals
    from nanovllm.model.kernels.build.codegen import host_cpu
    from nanovllm.model.kernels.build.peak import BFLOAT16_VARIABLE, bfloat16_choice
    from nanovllm.model.kernels.build.target import has_bfloat16_dot, host_target

    cpu, target = host_cpu(), host_target()
    instructions = [f"vectors of {32 * target.lanes} bits"]
    if has_bfloat16_dot(cpu):
        reason = f"{BFLOAT16_VARIABLE} is set" if bfloat16_choice() else "float32 is faster"
        note = "" if target.bfloat16_dot else f" (not used: {reason})"
        instructions.append(f"bfloat16 dot products{note}")
    instructions += ["int8 dot products"] if target.int8_dot else []
    for kind, refusal in tile_refusals(cpu).items():
        instructions.append(f"AMX tiles of {kind}" + (f" (not used: {refusal})" if refusal else ""))
    return ", ".join(instructions)


def _memory() -> str:
    """Return the machine's memory, its free part, and the limit of this process."""
    from nanovllm.model.machine import PHYSICAL_MEMORY, memory_limit

    parts = []
    with suppress(AttributeError, ValueError, OSError):  # Windows
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        parts.append(format_bytes(page_bytes * os.sysconf("SC_PHYS_PAGES")))
        parts.append(f"{format_bytes(page_bytes * os.sysconf('SC_AVPHYS_PAGES'))} unused")
    limit = memory_limit()
    if limit is not None and limit.name != PHYSICAL_MEMORY:
        parts.append(f"limit {format_bytes(limit.num_bytes)} ({limit.name})")
    return ", ".join(parts) or "unknown"


def _folders() -> dict[str, str]:
    from huggingface_hub import constants

    from nanovllm.hub.inventory import kernel_files
    from nanovllm.model.kernels.build.object_cache import user_cache
    from nanovllm.model.kernels.build.shipped import FOLDER

    shipped = len(list(FOLDER.glob("*.so")))
    kernels, files = user_cache().folder, kernel_files()
    size_bytes = sum(path.stat().st_size for path in files)
    return {
        "kernels": f"{kernels}, {_access(kernels)}, {counted(len(files), 'file')}, "
        f"{format_bytes(size_bytes)}" + (f"; {shipped} in the installation" if shipped else ""),
        "hub cache": f"{constants.HF_HUB_CACHE}, {_access(Path(constants.HF_HUB_CACHE))}",
    }


def _access(folder: Path) -> str:
    """Return whether files can be written below a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    can_write = existing.is_dir() and os.access(existing, os.W_OK)
    return "can be written" if can_write else f"cannot be written (because of {existing})"


def _versions() -> dict[str, str]:
    versions = dict.fromkeys(_PACKAGES, "not installed")
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def shown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that nanovllm reads; the values of possible secrets are hidden."""
    return {
        name: _shown(name, environment[name])
        for name in sorted(environment)
        if name.startswith((*_PUBLIC_PREFIXES, "NANOVLLM_", "HF_"))
    }


def _shown(name: str, value: str) -> str:
    known = VARIABLES.get(name)
    is_public = name.startswith(_PUBLIC_PREFIXES) or (known is not None and not known.is_secret)
    if not is_public:
        return "(set, not shown)" if value else "(empty)"
    return printable(_ACCOUNT.sub("", value)) if name == "HF_ENDPOINT" else printable(value)
