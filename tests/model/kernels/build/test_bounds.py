"""The check of every address: the accesses that it allows, and whole steps under it."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import types

from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.check_code import checked, size_of
from nanovllm.model.kernels.build.codegen import host_cpu
from nanovllm.model.kernels.build.compiler import compiled, intrinsic
from nanovllm.model.kernels.build.object_cache import ObjectCache
from nanovllm.model.kernels.build.target import Spec, host_target
from nanovllm.model.kernels.library import cache_key, load_image
from tests.support.checked import run_checked

TARGET = replace(host_target(), check=True)
CASES = "tests/model/kernels/checked_cases.py"


@pytest.mark.slow(80)
def test_whole_steps_under_the_check(tmp_path: Path) -> None:
    """Check the addresses of whole steps in another process, which saves no code."""
    run_checked("-m", "pytest", "-q", CASES, folder=tmp_path / "cache")
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.kernels")]
    assert all(size < 1000 for size in kept), "no code, at most the measured speeds (peak.py)"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", "True True\n"), ("0", "False False\n"), ("", "False False\n")]
)
def test_the_environment_asks_for_the_check(tmp_path: Path, value: str, expected: str) -> None:
    program = (
        "from nanovllm.model.kernels.build.target import KernelTarget, host_target;"
        "print(host_target().check, KernelTarget(4).check)"
    )
    assert run_checked("-c", program, check=value, folder=tmp_path) == expected


def test_code_that_checks_is_neither_kept_nor_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.model.kernels.library.compile_library", lambda *_: b"compiled")
    store, spec = ObjectCache(tmp_path / "kernels"), Spec(TARGET)
    assert load_image(spec, store) == b"compiled"
    assert not store.folder.exists()
    store.save(cache_key(spec, host_cpu()), b"of another process")
    assert load_image(spec, store) == b"compiled"


@cache
def look_up(size: int, *, writes: bool) -> Any:
    @intrinsic
    def check(typing_context: Any, address: Any) -> Any:
        return types.intp(types.intp), lambda context, builder, signature, arguments: checked(
            builder, arguments[0], size, writes=writes
        )

    @compiled
    def run(address: int) -> int:
        return int(check(address))

    return run


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_what_is_inside_an_array_and_nothing_else_passes(size: int, writes: bool) -> None:
    memory = np.zeros(1000, dtype=np.uint8)
    arrays = {
        "first": memory[100:164],
        "second": memory[300:301],
        "third": memory[164:200],
        "none": memory[500:500],
    }
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays.values()]
    for address in [
        *range(memory.ctypes.data, memory.ctypes.data + 600),
        0,
        -1,
        2**63 - 1,
        -(2**63),
    ]:
        fits = any(start <= address and address + size <= end for start, end in ranges)
        message = ""
        try:
            with watch(TARGET, "look_up", arrays.items()):
                returned = look_up(size, writes=writes)(address)
        except RuntimeError as error:
            message = str(error)
        assert (returned == address) == fits
        assert (message == "") == fits
        if message:
            assert message.startswith(
                f"look_up {'wrote' if writes else 'read'} {size} bytes at address {address:#x}, "
            )


def test_only_the_first_fault_is_described_and_all_are_counted() -> None:
    array = np.zeros(4, dtype=np.float32)

    def run() -> None:
        with watch(TARGET, "look_up", [("numbers", array)]):
            for address in (7, array.ctypes.data, 8, 9):
                look_up(4, writes=False)(address)

    with pytest.raises(RuntimeError, match=r"0x7, .* of numbers, which has 16 bytes; 3 accesses"):
        run()


def test_where_the_target_does_not_check_nothing_is_looked_at() -> None:
    def arrays() -> Any:
        raise AssertionError("asked for the arrays")
        yield

    with watch(replace(TARGET, check=False), "look_up", arrays()):
        pass


def test_sizes_are_those_of_memory() -> None:
    kinds = [
        ir.IntType(8),
        ir.IntType(64),
        ir.FloatType(),
        ir.DoubleType(),
        ir.VectorType(ir.FloatType(), 16),
        ir.VectorType(ir.IntType(16), 8),
    ]
    assert [size_of(kind) for kind in kinds] == [1, 8, 4, 8, 64, 16]
