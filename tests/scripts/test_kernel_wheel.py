"""The levels of a wheel with kernels have code for each CPU that they are made for."""

import argparse
import platform
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from nanovllm.errors import KernelError
from nanovllm.model.kernels.build import codegen, peak
from nanovllm.model.kernels.build.object_cache import user_cache
from nanovllm.model.kernels.build.peak import BFLOAT16_VARIABLE
from nanovllm.model.kernels.build.shipped import CPU_VARIABLES
from nanovllm.model.kernels.build.target import CACHE_TYPES, host_spec
from nanovllm.model.kernels.library import load_image, shared_name
from scripts import kernel_wheel

_HASWELL = "fma movbe f16c avx avx2 bmi1 bmi2"
_SKYLAKE = f"{_HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
_ICE_LAKE = f"{_SKYLAKE} avx512_vnni avx512_bitalg"
_ZEN_4 = f"{_ICE_LAKE} avx512_bf16"
CPUS = {
    "Haswell": ("GenuineIntel", 6, _HASWELL),
    "Zen 3": ("AuthenticAMD", 25, _HASWELL),
    "Alder Lake": ("GenuineIntel", 6, f"{_HASWELL} avx_vnni"),
    "Skylake server": ("GenuineIntel", 6, _SKYLAKE),
    "Ice Lake server": ("GenuineIntel", 6, _ICE_LAKE),
    "Sapphire Rapids": ("GenuineIntel", 6, f"{_ZEN_4} avx_vnni amx_bf16 amx_tile amx_int8"),
    "Zen 4": ("AuthenticAMD", 25, _ZEN_4),
    "Zen 5": ("AuthenticAMD", 26, f"{_ZEN_4} avx_vnni"),
    "Zen 5 with hidden instructions": ("AuthenticAMD", 26, f"{_SKYLAKE} avx512_vnni"),
}
TYPES = list(product(kernel_wheel.WEIGHTS, CACHE_TYPES))

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")


def names() -> Iterator[str]:
    return (shared_name(*library) for library in kernel_wheel.libraries(TYPES))


@pytest.fixture(scope="module")
def compiled() -> set[str]:
    """Names of the libraries that the levels compile."""
    found: set[str] = set()
    for level in kernel_wheel.LEVELS["x86_64"].values():
        with pytest.MonkeyPatch.context() as patch:
            for name, value in level.variables().items():
                patch.setenv(name, value)
            found |= {*names()}
    return found


@pytest.mark.parametrize("level", kernel_wheel.LEVELS["x86_64"])
def test_code_is_for_the_instructions_in_its_name_alone(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in kernel_wheel.LEVELS["x86_64"][level].variables().items():
        monkeypatch.setenv(name, value)
    for spec, entry_points in kernel_wheel.libraries(TYPES):
        cpu = kernel_wheel.cpu_of(spec.essential.target)
        name = shared_name(spec, entry_points)
        assert cpu.name == "x86-64"
        assert ("avx512f" in cpu.features) == ("-16-" in name)
        assert ("vnni" in cpu.features) == ("int8_dot" in name)
        assert ("avx512bf16" in cpu.features) == ("bfloat16_dot" in name)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without Numba and LLVM."""
    for variable in (*CPU_VARIABLES, BFLOAT16_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(codegen, "has_compiler", lambda: False)
    codegen.cpu_of_linux.cache_clear()
    yield
    codegen.cpu_of_linux.cache_clear()


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("is_faster", [False, True])
@pytest.mark.parametrize("cpu", CPUS)
def test_every_cpu_finds_its_kernels(
    cpu: str,
    is_faster: bool,
    compiled: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vendor, family, flags = CPUS[cpu]
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(text * 2)
    monkeypatch.setattr(codegen, "CPU_INFO", tmp_path / "cpuinfo")
    speeds = {"bfloat16": 2.0 if is_faster else 0.5, "float32": 1.0}
    monkeypatch.setattr(peak, "bfloat16_speeds", lambda *_: speeds)
    peak.is_bfloat16_dot_faster.cache_clear()
    assert {*names()} <= compiled
    peak.is_bfloat16_dot_faster.cache_clear()


@pytest.mark.usefixtures("bare")
def test_a_cpu_without_kernels_gets_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: set[str]
) -> None:
    monkeypatch.setattr(codegen, "CPU_INFO", tmp_path / "cpuinfo")
    with pytest.raises(KernelError, match=r"pip install 'numba[<>=0-9.,]+'"):
        list(names())  # there is no such file
    (tmp_path / "cpuinfo").write_text("flags\t: sse sse2 ssse3\n")
    codegen.cpu_of_linux.cache_clear()
    assert not {*names()} & compiled
    with pytest.raises(KernelError, match=r"pip install 'numba[<>=0-9.,]+'"):
        load_image(host_spec(), user_cache())


def test_unknown_levels_are_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="sse must be of avx2, zen5"):
        kernel_wheel.names_of(["avx2", "zen5"])("zen5,sse")
