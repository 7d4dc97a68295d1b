"""The levels of a wheel with kernels have code for each CPU that they are made for."""

import os
import platform
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from nanovllm.errors import KernelError
from nanovllm.model.kernels.build import codegen, peak
from nanovllm.model.kernels.build.object_cache import user_cache
from nanovllm.model.kernels.build.peak import BFLOAT16_VARIABLE
from nanovllm.model.kernels.build.shipped import CPU_VARIABLES
from nanovllm.model.kernels.build.target import CACHE_TYPES, WEIGHTS, host_spec
from nanovllm.model.kernels.library import BANDWIDTH, load_image, shared_name
from nanovllm.training.kernels.library import TRAINING
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
TYPES = list(product(WEIGHTS, CACHE_TYPES))
COMPILED = kernel_wheel.libraries(kernel_wheel.LEVELS["x86_64"].values(), TYPES)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")


def names() -> set[str]:
    """Names of the libraries that this CPU uses."""
    others = {shared_name(host_spec(), part) for part in (TRAINING, BANDWIDTH)}
    return {shared_name(host_spec(*types)) for types in TYPES} | others


def test_code_is_for_the_instructions_in_its_name_alone() -> None:
    for name, (spec, _) in COMPILED.items():
        cpu = kernel_wheel.cpu_of(spec.essential.target)
        assert cpu.name == "x86-64"
        assert ("avx512f" in cpu.features) == ("-16-" in name)
        assert ("vnni" in cpu.features) == ("int8_dot" in name)
        assert ("avx512bf16" in cpu.features) == ("bfloat16_dot" in name)


@pytest.mark.parametrize(
    ("arguments", "variable", "reason"),
    [
        (["--levels", "sse"], "NANOVLLM_CACHE_DIR", "sse must be of avx2, avx2-vnni"),
        ([], "NUMBA_DEBUGINFO", "unset NUMBA_DEBUGINFO, which would change the code"),
        ([], "NANOVLLM_CHECK", "unset NANOVLLM_CHECK, which would change the code"),
    ],
)
def test_what_it_cannot_build_is_refused(
    arguments: list[str],
    variable: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith(("NUMBA_", "NANOVLLM_CHECK"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("CC", sys.executable)
    with pytest.raises(SystemExit):
        kernel_wheel.main(arguments)
    assert reason in capsys.readouterr().err


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
    cpu: str, is_faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor, family, flags = CPUS[cpu]
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    (tmp_path / "cpuinfo").write_text(text * 2)
    monkeypatch.setattr(codegen, "CPU_INFO", tmp_path / "cpuinfo")
    speeds = {"bfloat16": 2.0 if is_faster else 0.5, "float32": 1.0}
    monkeypatch.setattr(peak, "keep_findings", lambda *_: speeds)
    peak.is_bfloat16_dot_faster.cache_clear()
    assert names() <= COMPILED.keys()
    peak.is_bfloat16_dot_faster.cache_clear()


@pytest.mark.usefixtures("bare")
def test_a_cpu_without_kernels_gets_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codegen, "CPU_INFO", tmp_path / "cpuinfo")
    with pytest.raises(KernelError, match=r"pip install 'numba[<>=0-9.,]+'"):
        names()  # there is no such file
    (tmp_path / "cpuinfo").write_text("flags\t: sse sse2 ssse3\n")
    codegen.cpu_of_linux.cache_clear()
    assert not names() & COMPILED.keys()
    with pytest.raises(KernelError, match=r"pip install 'numba[<>=0-9.,]+'"):
        load_image(host_spec(), user_cache())
