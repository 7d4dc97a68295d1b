"""Build a wheel with compiled kernels, which starts without Numba and without compiling.

Run: python scripts/kernel_wheel.py

A library is compiled for no more instructions than its name says, because they are what is checked
at run time. A linker (cc, or that of the variable CC) makes shared objects. The wheel needs Linux,
this architecture, and the C library's version that the shared objects name. Numba is an extra of
it, `compile`.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from platform import machine

import nanovllm
from nanovllm.model.kernels.build.codegen import LLVMCpu, llvm
from nanovllm.model.kernels.build.peak import emit_spin, peak_name
from nanovllm.model.kernels.build.shipped import FOLDER
from nanovllm.model.kernels.build.target import (
    BFLOAT16_DOT,
    CACHE_TYPES,
    INT8_DOT,
    VECTORS,
    WEIGHTS,
    KernelTarget,
    Spec,
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

_LINK = ("-shared", "-nostdlib", "-s", "-Wl,-z,now,-z,noexecstack")
_LIBRARIES = ("-lm", "-lpthread", "-lc")
_GLIBC = re.compile(rb"GLIBC_2\.(\d+)")
_NUMBA = re.compile(r"^(Requires-Dist: numba\b[^;\n]*)$", re.MULTILINE)


_AVX512 = KernelTarget(lanes=16, is_x86=True, prefetch_next_block=True)
_ZEN5 = KernelTarget(lanes=16, is_x86=True, int8_dot=True, nontemporal=True)
LEVELS = {
    "x86_64": {
        "avx2": KernelTarget(lanes=8, is_x86=True),
        "avx2-vnni": KernelTarget(lanes=8, is_x86=True, int8_dot=True),
        "avx512": _AVX512,
        "avx512-vnni": replace(_AVX512, int8_dot=True),
        "avx512-bfloat16": replace(_AVX512, int8_dot=True, bfloat16_dot=True),
        "zen5": replace(_ZEN5, bfloat16_dot=True),
        "zen5-float32": _ZEN5,
    },
    "aarch64": {
        "neon": KernelTarget(lanes=4),
        "neon-dotprod": KernelTarget(lanes=4, int8_dot=True),
        "neon-bfloat16": KernelTarget(lanes=4, int8_dot=True, bfloat16_dot=True),
    },
}
"""By architecture. Levels share the kernels of types that use none of the further instructions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the wheel."""
    levels = tuple(LEVELS.get(machine(), ()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, known in (("levels", levels), ("weights", WEIGHTS), ("caches", CACHE_TYPES)):
        what = f"default: {','.join(known)}"
        parser.add_argument(f"--{name}", type=names_of(known), default=known, help=what)
    parser.add_argument("--wheel", type=Path, help="one that was built from this source tree")
    parser.add_argument("--dest", type=Path, default=Path("dist"), help="default: %(default)s")
    parsed = parser.parse_args(arguments)
    if sys.platform != "linux" or not levels:
        parser.error(f"there are no levels for {sys.platform} on {machine()}")
    if shutil.which(_linker()[0]) is None:
        parser.error(f"the linker {_linker()[0]} is missing; install gcc, or set CC to another one")
    if changing := [name for name in os.environ if name.startswith(("NUMBA_", "NANOVLLM_CHECK"))]:
        parser.error(f"unset {', '.join(changing)}, which would change the code")
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
        targets = [LEVELS[machine()][level] for level in parsed.levels]
        _write_libraries(kernels, libraries(targets, product(parsed.weights, parsed.caches)))
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


def libraries(
    targets: Iterable[KernelTarget], types: Iterable[tuple[str, str]]
) -> dict[str, tuple[Spec, EntryPoints]]:
    """Return what is compiled for targets and types of weights and KV cache, by its name."""
    targets = tuple(targets)
    found = [(Spec(target, *pair), INFERENCE) for target, pair in product(targets, types)]
    found += [(Spec(target), part) for target, part in product(targets, (TRAINING, BANDWIDTH))]
    return {shared_name(*library): library for library in found}


def _write_libraries(folder: Path, wanted: Mapping[str, tuple[Spec, EntryPoints]]) -> None:
    with ProcessPoolExecutor(usable_cpus()) as pool:
        names = {pool.submit(_write, folder, *library): name for name, library in wanted.items()}
        for number, job in enumerate(as_completed(names), 1):
            job.result()
            print(f"{number} of {len(names)}: {names[job]}", flush=True)


def _write(folder: Path, spec: Spec, entry_points: EntryPoints) -> None:
    cpu = cpu_of(spec.essential.target)
    path = folder / f"{shared_name(spec, entry_points)}.so"
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
    names = [*VECTORS[target.lanes]]
    names += [INT8_DOT[target.lanes]] if target.int8_dot else []
    names += [BFLOAT16_DOT[target.lanes]] if target.bfloat16_dot else []
    model = "x86-64" if target.is_x86 else "generic"
    return LLVMCpu(llvm().get_process_triple(), model, ",".join(f"+{name}" for name in names))


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
