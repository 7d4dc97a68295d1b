"""The cache of compiled code: it returns the code that was stored, and never other code."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llvmlite import binding

import nanovllm
from nanovllm.model.kernels import library as library_module
from nanovllm.model.kernels.build.codegen import (
    Library,
    LLVMCpu,
    create_target_machine,
    host_cpu,
)
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled, emit_object, link
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE, ObjectCache, user_cache
from nanovllm.model.kernels.build.target import KernelTarget, Spec, host_target
from nanovllm.model.kernels.library import ENTRIES, INFERENCE, cache_key, load_image, load_library
from nanovllm.model.kernels.simd.memory import load_int
from nanovllm.model.kernels.threads import worker
from nanovllm.training.kernels.library import TRAINING
from tests.support.cache_processes import KEY, compile_unless_there, save_and_load

SPEC = Spec(KernelTarget(16))
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="folders have no mode there")


@compiled
def third(address: int, number: int) -> None:
    """Return at once for numbers from 0 on, and never for others."""
    while number < 0:
        number += load_int(address, 0) * 0


@pytest.fixture(scope="module")
def image() -> bytes:
    third.compile(ARGUMENTS)  # type: ignore[attr-defined]
    return emit_object({"third": third}, host_cpu())


@pytest.fixture
def store(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache" / "kernels")


def files_of(store: ObjectCache) -> list[Path]:
    return sorted(store.folder.iterdir())


def test_an_object_file_becomes_functions(image: bytes) -> None:
    library = Library(image, ["third"])
    assert library.functions["third"](0, 5) == 0
    assert library.addresses["third"] > 0


def test_machine_code_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba by itself makes one for every function, a third of the compile time, for nobody."""

    def refuse(library: Any) -> None:
        raise AssertionError(f"machine code of {library}")

    def twice(address: int, number: int) -> None:
        third(address, number)
        third(address, number)

    monkeypatch.setattr("numba.core.codegen.JITCodeLibrary._finalize_specific", refuse)
    function: Any = compiled(twice)
    function.compile(ARGUMENTS)
    assert "@twice" in str(link({"twice": function}, create_target_machine(host_cpu())))


def test_numba_is_left_as_it_was_for_others() -> None:
    program = """
from nanovllm.model.kernels.build import compiler
import numba
compiler.compiled(lambda address, number: None).compile(compiler.ARGUMENTS)
from numba.core.runtime import rtsys
print(type(rtsys.library).__name__, numba.njit(lambda n: [str(n)] * 2)(5))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split(maxsplit=1) == ["JITCodeLibrary", "['5', '5']\n"]


def test_functions_can_be_called_from_python_too() -> None:
    @compiled
    def add(a: float, b: float) -> float:
        return a + b

    @compiled
    def add_three(a: float, b: float, c: float) -> float:
        return add(add(a, b), c)

    assert add_three(1, 2, 3) == 1 + 2 + 3
    assert add_three(0.5, 2, 3) == 0.5 + 2 + 3


def test_code_calls_nothing_but_the_operating_system() -> None:
    """An unresolved symbol would end the process when the file is loaded."""
    entries: dict[str, Any] = {
        "third": third,
        "run_job": worker.run_job,
        "help_job": worker.help_job,
        "prepare_job": worker.prepare_job,
    }
    for function in entries.values():
        function.compile(ARGUMENTS)
    module = link(entries, create_target_machine(host_cpu()))
    values = [*module.functions, *module.global_variables]
    outside = {
        value.name
        for value in values
        if value.is_declaration and not value.name.startswith("llvm.")
    }
    pthread = (
        "mutex_init",
        "mutex_lock",
        "mutex_unlock",
        "cond_init",
        "cond_wait",
        "cond_broadcast",
    )
    assert outside <= {f"pthread_{name}" for name in pthread} | {
        "AcquireSRWLockExclusive", "ReleaseSRWLockExclusive", "SleepConditionVariableSRW",
        "WakeAllConditionVariable",
        "clock_gettime", "QueryPerformanceCounter",
    }  # fmt: skip
    assert {
        value.name
        for value in module.functions
        if not value.is_declaration and value.linkage == binding.Linkage.external
    } == set(entries)


def test_nothing_of_python_is_left_in_the_code() -> None:
    image = load_image(Spec(host_target()), user_cache())
    assert not re.search(rb"_?Py[A-Z_]|NRT_|numba_", image)
    assert all(name.encode() in image for name in ENTRIES)


def test_what_is_kept_is_found_again(store: ObjectCache) -> None:
    assert store.load(KEY) is None
    assert store.save(KEY, b"code")
    assert store.load(KEY) == b"code"
    assert store.load("1" * 64) is None
    assert [path.name for path in files_of(store)] == [f"{KEY}.kernels"]


@pytest.mark.parametrize(
    "damage", ["empty", "short", "shorter than its head", "changed", "another's"]
)
def test_a_damaged_file_is_not_loaded(store: ObjectCache, damage: str) -> None:
    store.save(KEY, b"code" * 100)
    (path,) = files_of(store)
    content = path.read_bytes()
    bad = {
        "empty": b"",
        "short": content[:-1],
        "shorter than its head": content[:20],
        "changed": content[:-1] + b"!",
        "another's": b"something else\n" + content[15:],
    }
    path.write_bytes(bad[damage])
    assert store.load(KEY) is None
    store.save(KEY, b"code")
    assert store.load(KEY) == b"code"


@posix_only
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o707])
def test_a_folder_that_others_may_write_to_is_not_used(store: ObjectCache, mode: int) -> None:
    store.save(KEY, b"code")
    store.folder.chmod(mode)
    assert store.load(KEY) is None
    assert not store.save("1" * 64, b"code")
    store.folder.chmod(0o700)
    assert store.load(KEY) == b"code"


@posix_only
def test_a_folder_of_somebody_else_is_not_used(
    store: ObjectCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(KEY, b"code")
    assert store.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: store.folder.stat().st_uid + 1)
    assert store.load(KEY) is None
    assert not store.save(KEY, b"code")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ObjectCache(tmp_path / "file" / "kernels")
    assert not store.save(KEY, b"code")
    assert store.load(KEY) is None


def test_only_the_newest_are_kept(store: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.model.kernels.build.object_cache._KEEP", 8)
    for number in range(12):
        store.save(str(number), b"code")
        os.utime(store.folder / f"{number}.kernels", (number, number))
    store.load("4")  # used again, and so not old
    abandoned = store.folder / "abandoned.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    fresh = store.folder / "fresh.tmp"
    fresh.write_bytes(b"half")
    store.save("12", b"code")
    assert {path.name for path in files_of(store)} == {
        f"{number}.kernels" for number in (4, 6, 7, 8, 9, 10, 11, 12)
    } | {"fresh.tmp"}


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert user_cache().folder == tmp_path / "kernels"
    monkeypatch.delenv(CACHE_VARIABLE)
    if sys.platform not in {"win32", "darwin"}:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert user_cache().folder == tmp_path / "nanovllm" / "kernels"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_cache().folder == tmp_path / ".cache" / "nanovllm" / "kernels"


def test_the_key_covers_all_that_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = LLVMCpu("triple", "name", "+features")
    keys = [
        cache_key(SPEC, cpu),
        cache_key(Spec(KernelTarget(8)), cpu),
        cache_key(Spec(KernelTarget(16), "int8"), cpu),
    ]
    keys += [
        cache_key(SPEC, other)
        for other in (LLVMCpu("x", "name", "+features"), LLVMCpu("triple", "x", "+features"))
    ]
    keys.append(cache_key(SPEC, LLVMCpu("triple", "name", "-features")))
    keys.append(cache_key(SPEC, cpu, replace(INFERENCE, sources="other sources")))
    with monkeypatch.context() as patch:
        patch.setattr(library_module, "version", lambda name: "0")
        keys.append(cache_key(SPEC, cpu))
    monkeypatch.setenv("NUMBA_OPT", "1")
    keys.append(cache_key(SPEC, cpu))
    assert len(set(keys)) == len(keys)
    monkeypatch.delenv("NUMBA_OPT")
    assert cache_key(SPEC, cpu) == keys[0]


def test_the_processor_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = host_cpu()
    assert here.name == binding.get_host_cpu_name()
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    assert host_cpu() == LLVMCpu(here.triple, "haswell", "")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "-avx2")
    assert host_cpu() == LLVMCpu(here.triple, "haswell", "-avx2")


def test_editing_any_source_changes_the_key(tmp_path: Path) -> None:
    """In a copy of the package, one byte changes and the file's time is restored."""
    package = tmp_path / "nanovllm"
    shutil.copytree(
        Path(nanovllm.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("bundled", "__pycache__"),
    )
    kernels = package / "model" / "kernels"
    ask = (
        "from nanovllm.model.kernels import library\n"
        "print(library.__file__, library.INFERENCE.sources)"
    )

    def digest() -> str:
        answer = subprocess.run(
            [sys.executable, "-Bc", ask],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        file, key = answer.stdout.split()
        assert Path(file).parent == kernels
        return key

    first = digest()
    assert digest() == first
    seen = {first}
    for name in ("simd/vector.py", "step_record.py", "threads/worker.py"):
        path = kernels / name
        times = path.stat()
        path.write_text(path.read_text().replace("1", "2", 1))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen.add(digest())
    for new in ("new.py", "simd/new.py"):
        (kernels / new).write_text("")
        seen.add(digest())
    (kernels / "simd" / "new.py").rename(kernels / "threads" / "new.py")
    seen.add(digest())
    assert len(seen) == 7


def test_code_is_not_kept_when_sources_changed_while_it_was_compiled(
    store: ObjectCache, monkeypatch: pytest.MonkeyPatch, image: bytes
) -> None:
    monkeypatch.setattr(library_module, "compile_library", lambda *_: image)
    monkeypatch.setattr(library_module, "digest_of_sources", lambda _: "edited meanwhile")
    assert load_image(SPEC, store) == image
    assert [path.suffix for path in files_of(store)] == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(library_module, "compile_library", lambda *_: image)
    assert load_image(SPEC, store) == image
    monkeypatch.setattr(library_module, "compile_library", lambda *_: b"compiled again")
    assert load_image(SPEC, store) == image


def test_processes_that_write_at_once_never_see_half_a_file(store: ObjectCache) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert (
            pool.starmap(save_and_load, [(str(store.folder), number) for number in range(4)])
            == [True] * 4
        )
    assert [path.name for path in files_of(store)] == [f"{KEY}.kernels"]


def test_of_processes_that_lack_the_same_code_one_compiles_it(store: ObjectCache) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert sorted(pool.starmap(compile_unless_there, [(str(store.folder), KEY)] * 3)) == [
            False,
            False,
            True,
        ]


def test_a_cache_that_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library_module, "compile_library", lambda *_: b"code")
    (tmp_path / "file").write_text("no folder")
    assert load_image(SPEC, ObjectCache(tmp_path / "file" / "kernels")) == b"code"
    compiling, told = capsys.readouterr().err.splitlines()
    assert compiling.startswith("nanovllm: compiling kernels for this CPU")
    assert compiling.endswith("takes 10 to 20 s"), "no promise that the second line contradicts"
    assert f"cannot be kept in {tmp_path / 'file' / 'kernels'}" in told
    assert CACHE_VARIABLE in told


def test_the_first_start_is_told_where_no_bar_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library_module, "compile_library", lambda *_: b"code")
    store = ObjectCache(tmp_path / "good")
    assert load_image(SPEC, store) == load_image(SPEC, store) == b"code"
    told = capsys.readouterr().err
    assert told.startswith(
        "nanovllm: compiling kernels for this CPU (float32 weights, float32 KV cache), which"
    )
    assert told.count("\n") == 1, "once, and in one line"
    assert str(store.folder) in told
    load_image(SPEC, store, TRAINING)
    assert "for this CPU (training), which" in capsys.readouterr().err
    monkeypatch.setattr(library_module, "shows_progress", lambda: True)
    assert load_image(SPEC, ObjectCache(tmp_path / "other")) == b"code"
    assert capsys.readouterr().err == ""


def test_where_a_lock_cannot_be_had_everybody_compiles(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with ObjectCache(tmp_path / "file").exclusive(KEY):
        assert (tmp_path / "file").read_text() == "no folder"


def test_a_cached_start_imports_no_numba() -> None:
    load_library(Spec(host_target()))  # now it is in the cache, unless that cannot be written to
    if user_cache().load(cache_key(Spec(host_target()), host_cpu())) is None:
        pytest.skip("there is no cache")
    program = (
        "import sys; from nanovllm.model.kernels import backend; "
        "from nanovllm.model.kernels.build.target import Spec, host_target;"
        "backend.load_library(Spec(host_target())); print('numba' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout == "False\n"
    assert answer.stderr == ""
