"""The compiled functions, from the cache where they are and compiled where they are not; either way the code that runs is the same.

The cache key is a digest of everything that the machine code depends on. The sources are read once, when this module is imported beside
them, so that code which was compiled from one state of the files is never kept under the name of another.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from importlib.abc import Traversable
from importlib.metadata import version
from importlib.resources import files

import llvmlite
import numpy as np
from llvmlite import binding

from nanovllm.model.kernels.build.codegen import Library, LLVMCpu, host_cpu
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE, ObjectCache, user_cache
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES, Spec
from nanovllm.progress import shows_progress

ENTRIES = (
    "plan_step",
    "forward",
    "logits",
    "greedy",
    "sample_rows",
    "prepare_job",
    "run_job",
    "help_job",
    "wake_helpers",
    "spin",
)
"""Functions that Python calls, each as function(address, thread) -> 0, or not 0 where it failed."""


@cache
def load_library(spec: Spec) -> Library:
    """The functions for these types on this CPU, once in a process."""
    return Library(load_image(spec, user_cache()), ENTRIES)


def load_image(spec: Spec, store: ObjectCache) -> bytes:
    """The object file of these functions, from `store` or compiled and kept there."""
    cpu = host_cpu()
    if (
        spec.target.check or CHECKS_ADDRESSES
    ):  # there is an address of this process in the code, see bounds.py
        return _compile(spec, cpu)
    key = cache_key(spec, cpu)
    image = store.load(key)
    if image is None:
        with store.exclusive(key):
            image = store.load(key)  # by whoever was here before
            if image is None:
                _tell_of_compilation(store)
                image = _compile(spec, cpu)
                if digest_of_sources() == SOURCES and not store.save(key, image):
                    _warn_about_cache(store)
    return image


def _tell_of_compilation(store: ObjectCache) -> None:
    """Say why this start is slow, unless a progress bar does: in a log, in a pipe."""
    if not shows_progress():
        print(
            "nanovllm: compiling kernels for this CPU, which takes 10 to 20 s and happens once; "
            f"they are kept in {store.folder}",
            file=sys.stderr,
            flush=True,
        )


def _warn_about_cache(store: ObjectCache) -> None:
    """Say why the next start will be slow again: nothing else shows it."""
    print(
        f"nanovllm: the compiled kernels cannot be kept in {store.folder}, so each start "
        f"compiles them again; set {CACHE_VARIABLE} to a folder that this user, and nobody else, may write to",
        file=sys.stderr,
    )


def _compile(spec: Spec, cpu: LLVMCpu) -> bytes:
    from nanovllm.model.kernels.entries import compile_entries  # noqa: PLC0415 - Numba is only imported where something is to be compiled

    return compile_entries(spec, cpu)


def cache_key(spec: Spec, cpu: LLVMCpu) -> str:
    """A digest of all that the machine code depends on."""
    numba_settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    llvm = ".".join(map(str, binding.llvm_version_info))
    versions = (
        version("numba"),
        llvmlite.__version__,
        llvm,
        np.__version__,
        platform.python_implementation(),
        platform.python_version(),
    )
    return hashlib.sha256(repr((SOURCES, versions, cpu, numba_settings, spec)).encode()).hexdigest()


def digest_of_sources() -> str:
    """Return a digest of the files of this package and of its subpackages."""
    digest = hashlib.sha256()
    for name, file in sorted(_sources(files(__package__))):
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the path below the package, and the file, of each Python source."""
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            yield from _sources(entry, f"{name}/")
        elif name.endswith(".py"):
            yield name, entry


SOURCES = digest_of_sources()
