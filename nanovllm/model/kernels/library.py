"""The compiled functions, loaded from the cache or compiled.

A library is a collection of entry points: those of inference are here, and training has its own.
The cache key is a digest of everything that the machine code depends on. The sources are read once,
when the modules are imported: code compiled from one state of the files is never stored under the
key of another.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.abc import Traversable
from importlib.metadata import version
from importlib.resources import files

import numpy as np

from nanovllm.model.kernels.build.codegen import Library, LLVMCpu, host_cpu, llvm
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE, ObjectCache, user_cache
from nanovllm.model.kernels.build.shipped import find_shipped
from nanovllm.model.kernels.build.target import CHECKS_ADDRESSES, Spec
from nanovllm.progress import shows_progress

POOL_ENTRIES = ("prepare_job", "run_job", "help_job", "wake_helpers", "spin")
"""The functions of ThreadPool, a part of each library."""
ENTRIES = (
    "prepare_attention", "forward", "logits", "greedy", "greedy_steps", "sample_rows", *POOL_ENTRIES
)  # fmt: skip
"""Functions that Python calls, as function(record_ptr, thread) -> status, 0 for success."""
_DIGEST_DIGITS = 16


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """The functions of one library.

    Attributes:
        package: its module `entries` has make_entries(spec), which returns the functions.
        purpose: what they are for, shown while they are compiled.
        names: names of the functions.
        compiled_in: packages and modules that the machine code depends on.
        sources: digest of their sources when the package was imported.
    """

    package: str
    purpose: str
    names: tuple[str, ...]
    compiled_in: tuple[str, ...]
    sources: str


def digest_of_sources(modules: Sequence[str]) -> str:
    """Return a digest of the files of modules and of packages with their subpackages."""
    digest = hashlib.sha256()
    for module in modules:
        parent, _, name = module.rpartition(".")
        for path, file in sorted(_sources(files(parent), (name, f"{name}.py"))):
            content = file.read_bytes()
            digest.update(f"{parent} {path} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(
    folder: Traversable, names: Collection[str] = (), prefix: str = ""
) -> Iterator[tuple[str, Traversable]]:
    """Yield the path below a folder, and the file, of each Python source, or those of `names`."""
    for entry in folder.iterdir():
        path = prefix + entry.name
        if names and entry.name not in names:
            continue
        if entry.is_dir():
            yield from _sources(entry, prefix=f"{path}/")
        elif path.endswith(".py"):
            yield path, entry


COMPILED_IN = (__package__, "nanovllm.model.sampling")
"""The kernels, and the layout of the sampler's settings."""
_SOURCES = digest_of_sources(COMPILED_IN)
INFERENCE = EntryPoints(__package__, "inference", ENTRIES, COMPILED_IN, _SOURCES)
BANDWIDTH = EntryPoints(
    f"{__package__}.bandwidth", "measuring bandwidth", ("read",), COMPILED_IN, _SOURCES
)


@cache
def load_library(spec: Spec, entry_points: EntryPoints = INFERENCE) -> Library:
    """Return the functions for these types on this CPU; they are loaded once in a process."""
    shipped = find_shipped(shared_name(spec, entry_points))
    if shipped is not None and not (spec.target.check or CHECKS_ADDRESSES):
        with suppress(OSError):  # as where programs may not be run from this file system
            return Library(shipped, entry_points.names)
    return Library(load_image(spec, user_cache(), entry_points), entry_points.names)


def shared_name(spec: Spec, entry_points: EntryPoints = INFERENCE) -> str:
    """Return the name of a library's shared object (shipped.py)."""
    target = spec.essential.target
    flags = [field.name for field in fields(target) if getattr(target, field.name) is True]
    package = entry_points.package.removeprefix("nanovllm.")
    sources = entry_points.sources[:_DIGEST_DIGITS]
    return "-".join((package, spec.weights, spec.cache, str(target.lanes), *flags, sources))


def load_image(spec: Spec, store: ObjectCache, entry_points: EntryPoints = INFERENCE) -> bytes:
    """Return the object file of these functions, from `store` or compiled and stored there."""
    llvm()  # without it, there is an explanation
    cpu = host_cpu()
    if spec.target.check or CHECKS_ADDRESSES:
        # the code has an address of this process in it (bounds.py)
        return compile_library(spec, cpu, entry_points)
    key = cache_key(spec, cpu, entry_points)
    image = store.load(key)
    if image is None:
        with store.exclusive(key):
            image = store.load(key)  # another process may have compiled it meanwhile
            if image is None:
                _announce_compilation(store, spec, entry_points)
                image = compile_library(spec, cpu, entry_points)
                if _is_unchanged(entry_points) and not store.save(key, image):
                    _warn_about_cache(store)
    return image


def _is_unchanged(entry_points: EntryPoints) -> bool:
    """Return whether the sources are those that were imported."""
    return digest_of_sources(entry_points.compiled_in) == entry_points.sources


def _announce_compilation(store: ObjectCache, spec: Spec, entry_points: EntryPoints) -> None:
    """Explain the slow start where no progress bar does, as in a log or a pipe."""
    if entry_points != BANDWIDTH and not shows_progress():  # that takes a second
        purpose = entry_points.purpose
        if entry_points == INFERENCE:
            purpose = f"{spec.weights} weights, {spec.cache} KV cache"
        kept = f" and happens once; they are kept in {store.folder}" if store.is_usable() else ""
        print(
            f"nanovllm: compiling kernels for this CPU ({purpose}), which takes 10 to 20 s{kept}",
            file=sys.stderr,
            flush=True,
        )


def _warn_about_cache(store: ObjectCache) -> None:
    """Explain why the next start will be slow again."""
    print(
        f"nanovllm: the compiled kernels cannot be kept in {store.folder}, so each start "
        f"compiles them again; set {CACHE_VARIABLE} to a folder that this user, and nobody else, "
        "may write to",
        file=sys.stderr,
    )


def compile_library(
    spec: Spec, cpu: LLVMCpu, entry_points: EntryPoints, *, is_shared: bool = False
) -> bytes:
    """Return the object file of these functions; `is_shared` as in create_target_machine."""
    # Numba is imported only to compile.
    from nanovllm.model.kernels.build.compiler import compile_entries  # noqa: PLC0415

    module = import_module(f"{entry_points.package}.entries")
    return compile_entries(module.make_entries(spec.essential), cpu, is_shared=is_shared)


def cache_key(spec: Spec, cpu: LLVMCpu, entry_points: EntryPoints = INFERENCE) -> str:
    """Return a digest of all that the machine code depends on."""
    numba_settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    versions = (
        version("numba"),
        version("llvmlite"),
        ".".join(map(str, llvm().llvm_version_info)),
        np.__version__,
        platform.python_implementation(),
        platform.python_version(),
    )
    parts = (entry_points, versions, cpu, numba_settings, spec.essential)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
