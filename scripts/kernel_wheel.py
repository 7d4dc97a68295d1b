"""Build a wheel with compiled kernels, which starts without Numba and without compiling.

Run: python scripts/kernel_wheel.py

Each level has a process of its own, which Numba's variables tell the CPU. A library is compiled for
no more instructions than its name says, because they are what is checked at run time. A linker (cc,
or that of the variable CC) makes shared objects. The wheel needs Linux, this architecture, and the
C library's version that the shared objects name. Numba is an extra of it, `compile`.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from platform import machine
from typing import NamedTuple

import nanovllm
from nanovllm.model.kernels.build.codegen import LLVMCpu, llvm
from nanovllm.model.kernels.build.peak import BFLOAT16_VARIABLE, emit_spin, peak_name
from nanovllm.model.kernels.build.shipped import CPU_VARIABLES, FOLDER
from nanovllm.model.kernels.build.target import (
    CACHE_TYPES,
    DTYPES,
    QUANTIZATIONS,
    KernelTarget,
    Spec,
    host_spec,
)
from nanovllm.model.kernels.library import (
    BANDWIDTH,
    INFERENCE,
    EntryPoints,
    compile_library,
    shared_name,
)
from nanovllm.model.machine import usable_cpus
from nanovllm.training.kernels.library import TRAINING

WEIGHTS = (*DTYPES, *QUANTIZATIONS)
_LINK = ("-shared", "-nostdlib", "-s", "-Wl,-z,now,-z,noexecstack")
_LIBRARIES = ("-lm", "-lpthread", "-lc")
_GLIBC = re.compile(rb"GLIBC_2\.(\d+)")
_NUMBA = re.compile(r"^(Requires-Dist: numba\b[^;\n]*)$", re.MULTILINE)


class Level(NamedTuple):
    """CPUs that share their kernels.

    Attributes:
        cpu, features: what Numba's variables name.
        bfloat16: how bfloat16 weights are multiplied, if both ways are possible.
    """

    cpu: str
    features: str
    bfloat16: str = ""

    def variables(self) -> dict[str, str]:
        """Return the environment variables for which code of this level is compiled."""
        return dict(zip((*CPU_VARIABLES, BFLOAT16_VARIABLE), self, strict=True))


_AVX2 = "+avx2,+fma"
_AVX512 = f"{_AVX2},+avx512f,+avx512vl,+avx512bw,+avx512dq"
_VNNI = f"{_AVX512},+avx512vnni"
_BFLOAT16 = f"{_VNNI},+avx512bf16"
LEVELS = {
    "x86_64": {
        "avx2": Level("x86-64", _AVX2),
        "avx2-vnni": Level("x86-64", f"{_AVX2},+avxvnni"),
        "avx512": Level("x86-64", _AVX512),
        "avx512-vnni": Level("x86-64", _VNNI),
        "avx512-bfloat16": Level("x86-64", _BFLOAT16, "dot"),
        "zen5": Level("znver5", _BFLOAT16, "dot"),
        "zen5-float32": Level("znver5", _BFLOAT16, "float32"),
    },
    "aarch64": {
        "neon": Level("generic", "+neon"),
        "neon-dotprod": Level("generic", "+neon,+dotprod"),
        "neon-bfloat16": Level("generic", "+neon,+dotprod,+bf16", "dot"),
    },
}
"""By architecture. Levels share the kernels of types that use none of the further instructions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the wheel, or compile a level."""
    levels = tuple(LEVELS.get(machine(), ()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, known in (("levels", levels), ("weights", WEIGHTS), ("caches", CACHE_TYPES)):
        what = f"default: {','.join(known)}"
        parser.add_argument(f"--{name}", type=names_of(known), default=known, help=what)
    parser.add_argument("--wheel", type=Path, help="one that was built from this source tree")
    parser.add_argument("--dest", type=Path, default=Path("dist"), help="default: %(default)s")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if sys.platform != "linux" or not levels:
        parser.error(f"there are no levels for {sys.platform} on {machine()}")
    if shutil.which(_linker()[0]) is None:
        parser.error(f"the linker {_linker()[0]} is missing; install gcc, or set CC to another one")
    if parsed.compile:
        compile_level(parsed.compile, product(parsed.weights, parsed.caches))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        if parsed.wheel is None:
            _run("build", "--wheel", "--outdir", scratch, Path(__file__).parents[1])
            [parsed.wheel] = Path(scratch).glob("*.whl")
        print(make_wheel(parsed))
    return 0


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return the type of an option: names of `known`, separated by commas."""

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)} must be of {', '.join(known) or 'another architecture'}"
            )
        return chosen

    return names


def make_wheel(parsed: argparse.Namespace) -> Path:
    """Write the wheel with kernels to the folder `parsed.dest`; return its path."""
    with tempfile.TemporaryDirectory() as scratch:
        _run("wheel", "unpack", parsed.wheel, "--dest", scratch)
        [folder] = Path(scratch).iterdir()
        _check_sources(folder)
        kernels = folder / FOLDER.relative_to(Path(nanovllm.__file__).parents[1])
        kernels.mkdir()
        _write_peaks(kernels)
        for level in parsed.levels:
            before = len(list(kernels.iterdir()))
            _compile_in_process(level, kernels, parsed)
            print(f"{level}: {len(list(kernels.iterdir())) - before} shared objects", flush=True)
        _rewrite(folder, f"py3-none-manylinux_2_{_least_glibc(kernels)}_{machine()}")
        packed = Path(scratch) / "packed"
        packed.mkdir()
        _run("wheel", "pack", folder, "--dest-dir", packed)
        [path] = packed.iterdir()
        parsed.dest.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(path, parsed.dest))


def _run(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _check_sources(folder: Path) -> None:
    """Raise SystemExit if an unpacked wheel has other code than what is compiled here."""
    root = Path(nanovllm.__file__).parents[1]
    for path in (folder / "nanovllm").rglob("*.py"):
        source = root / path.relative_to(folder)
        if not source.is_file() or source.read_bytes() != path.read_bytes():
            sys.exit(f"the wheel was built from another state: {source} differs; build it again")
    if (folder / FOLDER.relative_to(root)).exists():
        sys.exit("the wheel has kernels already")


def _compile_in_process(level: str, folder: Path, parsed: argparse.Namespace) -> None:
    options = ("--weights", ",".join(parsed.weights), "--caches", ",".join(parsed.caches))
    command = [sys.executable, __file__, "--compile", str(folder), *options]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NANOVLLM_", "NUMBA_"))
    }
    environment = {**kept, **LEVELS[machine()][level].variables()}
    subprocess.run(command, check=True, env=environment)


def _rewrite(folder: Path, tag: str) -> None:
    """Change the tag of an unpacked wheel, and make Numba an extra."""
    [info] = folder.glob("*.dist-info")
    text = (info / "WHEEL").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^Tag: .*$", f"Tag: {tag}", text)
    text = text.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    (info / "WHEEL").write_text(text, encoding="utf-8")
    text = (info / "METADATA").read_text(encoding="utf-8")
    text, count = _NUMBA.subn(r"\1; extra == 'compile'", text)
    assert count == 1, "the wheel does not require Numba"
    (info / "METADATA").write_text(text, encoding="utf-8")


def _least_glibc(folder: Path) -> int:
    """Return the minor version of the C library that the shared objects need."""
    found = (_GLIBC.findall(path.read_bytes()) for path in folder.iterdir())
    return max(int(version) for versions in found for version in versions)


def compile_level(folder: Path, types: Iterable[tuple[str, str]]) -> None:
    """Compile what `folder` lacks for the CPU that Numba's variables name."""
    with ProcessPoolExecutor(usable_cpus()) as pool:
        jobs = [pool.submit(_write_library, folder, *library) for library in libraries(types)]
        for job in jobs:
            job.result()


def libraries(types: Iterable[tuple[str, str]]) -> Iterator[tuple[Spec, EntryPoints]]:
    """Yield what is compiled for the CPU that Numba's variables name.

    Args:
        types: of weights and KV cache.
    """
    for weights, cache in types:
        yield host_spec(weights, cache), INFERENCE
    yield host_spec(), TRAINING
    yield host_spec(), BANDWIDTH


def _write_library(folder: Path, spec: Spec, entry_points: EntryPoints) -> None:
    path = folder / f"{shared_name(spec, entry_points)}.so"
    if not path.exists():
        cpu = cpu_of(spec.essential.target)
        _link(compile_library(spec, cpu, entry_points, is_shared=True), path)


def _write_peaks(folder: Path) -> None:
    """Compile what measures instructions, even those that no chosen level uses."""
    is_x86 = machine() == "x86_64"
    for kind, lanes in product(WEIGHTS, (8, 16) if is_x86 else (4,)):
        dots = {"bfloat16_dot": kind == "bfloat16", "int8_dot": kind == "int8"}
        if kind == "bfloat16" and lanes == 8:  # no CPU has AVX-VNNI's twin for bfloat16
            continue
        cpu = cpu_of(KernelTarget(lanes=lanes, is_x86=is_x86, **dots))
        _link(emit_spin(kind, lanes, cpu, is_shared=True), folder / f"{peak_name(kind, lanes)}.so")


def cpu_of(target: KernelTarget) -> LLVMCpu:
    """Return the least CPU that has the instructions of a target."""
    triple = llvm().get_process_triple()
    if not target.is_x86:
        features = ["+neon", *["+dotprod"] * target.int8_dot, *["+bf16"] * target.bfloat16_dot]
        return LLVMCpu(triple, "generic", ",".join(features))
    features = [_AVX512 if target.lanes == 16 else _AVX2]
    if target.int8_dot:
        features.append("+avx512vnni" if target.lanes == 16 else "+avxvnni")
    if target.bfloat16_dot:
        features.append("+avx512bf16")
    return LLVMCpu(triple, "x86-64", ",".join(features))


def _link(image: bytes, path: Path) -> None:
    """Write the shared object of an object file."""
    with tempfile.NamedTemporaryFile(suffix=".o") as file:
        file.write(image)
        file.flush()
        command = [*_linker(), *_LINK, "-o", str(path), file.name, *_LIBRARIES]
        subprocess.run(command, check=True)


def _linker() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


if __name__ == "__main__":
    sys.exit(main())
