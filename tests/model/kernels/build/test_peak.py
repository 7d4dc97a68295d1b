"""The measured instructions: they compute what is counted, and the choice is kept."""

import struct

import pytest

from nanovllm.model.kernels.build import peak
from nanovllm.model.kernels.build.codegen import LLVMCpu, host_cpu
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE
from nanovllm.model.kernels.build.target import has_bfloat16_dot, host_target
from tests.support.targets import set_cpu_name

HOST = host_target()
AVAILABLE = {"float32": True, "bfloat16": has_bfloat16_dot(host_cpu()), "int8": HOST.int8_dot}


@pytest.mark.parametrize(
    ("kind", "word", "products"),
    [("float32", 0x40400000, 1), ("bfloat16", 0x40404040, 2), ("int8", 0x03030303, 4)],
)
def test_every_multiply_add_is_done(kind: str, word: int, products: int) -> None:
    if not AVAILABLE[kind]:
        pytest.skip(f"this CPU has no {kind} instruction")
    spin, chains = peak.make_spin(kind, HOST.lanes)
    bits = struct.pack("<i", spin(100, word))
    (total,) = struct.unpack("<i" if kind == "int8" else "<f", bits)
    assert total == pytest.approx(100 * 9 * products, rel=1e-2)
    assert chains >= 8
    assert products == peak.instruction(kind, HOST.lanes).per_word


@pytest.mark.parametrize("cpu", ["x86-64", "haswell"])
def test_float32_needs_no_function_of_the_c_library(
    monkeypatch: pytest.MonkeyPatch, cpu: str
) -> None:
    """Without FMA, LLVM would call fmaf for each lane of a fused multiply-add."""
    if not HOST.is_x86:
        pytest.skip("x86 code")
    set_cpu_name(monkeypatch, cpu)
    assert b"fmaf" not in peak.emit_spin("float32", 4)


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiply-add of int16 is known"):
        peak.instruction("int16", 8)


@pytest.fixture
def speeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """Speeds that are measured, in an empty cache on a CPU with dot products."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    this_cpu = LLVMCpu("triple", "name", "+avx512f,+avx512bf16")
    monkeypatch.setattr(peak, "this_cpu", lambda: this_cpu)
    speeds = {"bfloat16": 1.3, "float32": 1.0}
    monkeypatch.setattr(peak, "measure_instruction", lambda kind, _lanes: speeds[kind])
    return speeds


def test_the_choice_is_measured_once(
    speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = peak.is_bfloat16_dot_faster.__wrapped__
    by_llvm = LLVMCpu("x86_64-unknown-linux-gnu", "sapphirerapids", "+avx512bf16,-avx10.1")
    by_linux = LLVMCpu("x86_64-unknown-linux", "generic", "+avx512bf16")
    assert choose(by_llvm, 16)
    speeds["bfloat16"] = 1.1
    assert choose(by_llvm, 16), "as it was measured first"
    assert choose(by_linux, 16), "the same CPU, as a wheel without LLVM names it"
    monkeypatch.setattr(peak, "cpu_name", lambda: "another")
    assert not choose(by_llvm, 16), "too small a gain"


def test_code_that_this_cpu_cannot_run_is_not_measured(
    speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peak, "this_cpu", lambda: LLVMCpu("triple", "name", "+avx512f,-avx512bf16"))
    speeds.clear()
    assert peak.is_bfloat16_dot_faster.__wrapped__(LLVMCpu("triple", "name", "+feature"), 16)


def test_the_variable_overrides_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "float32")
    assert not host_target().bfloat16_dot
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "dot")
    if has_bfloat16_dot(host_cpu()):
        assert host_target().bfloat16_dot
    set_cpu_name(monkeypatch, "haswell" if HOST.is_x86 else "cortex-a72")
    with pytest.raises(ValueError, match="this CPU has no dot products of bfloat16; unset it"):
        host_target()
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "fast")
    with pytest.raises(ValueError, match="NANOVLLM_BFLOAT16 is 'fast'; set it to dot or float32"):
        host_target()
