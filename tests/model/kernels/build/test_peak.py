"""The measured instructions: they compute what is counted, and the choice is kept."""

import struct

import pytest

from nanovllm.model.kernels.build import peak
from nanovllm.model.kernels.build.codegen import LLVMCpu, host_cpu
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE
from nanovllm.model.kernels.build.target import has_bfloat16_dot, host_target

HOST = host_target()
AVAILABLE = {"float32": True, "bfloat16": has_bfloat16_dot(), "int8": HOST.int8_dot}


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


def test_the_choice_is_measured_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv(peak.BFLOAT16_VARIABLE, raising=False)
    speeds = {"bfloat16": 1.3, "float32": 1.0}
    measured: list[str] = []

    def measure(kind: str, _lanes: int) -> float:
        measured.append(kind)
        return speeds[kind]

    monkeypatch.setattr(peak, "measure_instruction", measure)
    choose = peak.uses_bfloat16_dot.__wrapped__
    cpu = host_cpu()
    assert choose(cpu, 16)
    speeds["bfloat16"] = 1.1
    assert choose(cpu, 16), "as it was measured first"
    assert measured == ["bfloat16", "float32"]
    other = LLVMCpu(cpu.triple, cpu.name, "+other")
    assert not choose(other, 16), "too small a gain"
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "dot")
    assert choose(other, 16)
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "float32")
    assert not choose(cpu, 16)
    monkeypatch.setenv(peak.BFLOAT16_VARIABLE, "fast")
    with pytest.raises(ValueError, match="NANOVLLM_BFLOAT16 is 'fast'; set it to dot or float32"):
        choose(cpu, 16)
