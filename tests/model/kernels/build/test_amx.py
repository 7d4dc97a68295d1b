"""The tile unit is used where it computes the bits of its twin and is faster, and is allowed."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels.build import amx, target
from nanovllm.model.kernels.build.codegen import LLVMCpu, host_cpu
from nanovllm.model.kernels.build.object_cache import CACHE_VARIABLE
from nanovllm.model.kernels.build.peak import BFLOAT16_VARIABLE
from nanovllm.model.kernels.build.target import KernelTarget, Spec, host_target
from nanovllm.model.kernels.build.tile_twin import configuration, multiply_add

CPU = LLVMCpu(
    "triple",
    "name",
    ",".join(f"+{name}" for name in sorted(set().union(*amx.FEATURES.values()))) + ",-avx10.1",
)
SPEEDS = {"tiles": 9e12, "vectors": 1e12}
_ALL = frozenset({"bfloat16", "int8"})


class Machine:
    """What a CPU with the unit would show."""

    def __init__(self) -> None:
        self.finds = 0
        self.is_permitted = True
        self.found: dict[str, dict[str, Any]] = {
            kind: {"same_bits": True, **SPEEDS} for kind in amx.FEATURES
        }

    def find(self, kind: str) -> dict[str, Any]:
        self.finds += 1
        return self.found[kind]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with the unit, and an empty cache."""
    machine = Machine()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    for variable in (amx.AMX_VARIABLE, BFLOAT16_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(amx, "this_cpu", lambda: CPU)
    monkeypatch.setattr(amx, "request_permission", lambda: machine.is_permitted)
    monkeypatch.setattr(amx, "_find", machine.find)
    amx._findings.cache_clear()  # noqa: SLF001 - what another test has found
    return machine


def test_only_what_the_weights_need_is_measured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(amx.AMX_VARIABLE, "1")
    assert not amx.usable_tiles(CPU, ("float32",))
    assert machine.finds == 0
    assert amx.usable_tiles(CPU, ("int8",)) == {"int8"}
    assert machine.finds == 1


def test_the_types_of_a_model_are_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def usable_tiles(_cpu: LLVMCpu, weights: tuple[str, ...]) -> frozenset[str]:
        asked.append(weights)
        return frozenset()

    monkeypatch.setattr(target, "usable_tiles", usable_tiles)
    monkeypatch.setattr(target, "is_bfloat16_dot_faster", pytest.fail)
    target.host_spec("float32", "int8")
    target.host_spec("int8", "float32")
    assert asked == [("float32",), ("int8",)]


def test_it_is_checked_and_measured_once(machine: Machine) -> None:
    assert amx.usable_tiles(CPU) == _ALL
    machine.found["int8"] = {"same_bits": False}
    assert amx.usable_tiles(CPU) == _ALL, "as it was found first"
    amx._findings.cache_clear()  # noqa: SLF001 - as in another process
    assert amx.usable_tiles(CPU) == _ALL
    assert machine.finds == len(_ALL)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"same_bits": False}, "their bits are not those that Intel documents"),
        ({"same_bits": True, "tiles": 1.1, "vectors": 1.0}, "vectors are as fast"),
    ],
)
def test_each_type_is_refused_for_itself(
    machine: Machine, found: dict[str, Any], reason: str
) -> None:
    machine.found["bfloat16"] = found
    assert amx.usable_tiles(CPU) == {"int8"}
    assert amx.tile_refusals(CPU) == {"bfloat16": reason, "int8": ""}


@pytest.mark.parametrize("hidden", ["avx512bf16", "avx512vl"])
def test_a_unit_without_vector_instructions_is_left_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    """A hypervisor may hide them, and measuring them would end the process."""
    cpu = replace(CPU, features=CPU.features.replace(f"+{hidden}", f"-{hidden}"))
    monkeypatch.setattr(amx, "this_cpu", lambda: cpu)
    assert amx.usable_tiles(cpu) == ({"int8"} if hidden == "avx512bf16" else set())
    assert machine.finds == len(amx.usable_tiles(cpu))


def test_without_a_compiler_the_reason_is_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "has_compiler", lambda: False)
    assert not amx.usable_tiles(CPU)
    assert all("Numba" in reason for reason in amx.tile_refusals(CPU).values())
    monkeypatch.setenv(amx.AMX_VARIABLE, "1")
    with pytest.raises(ValueError, match="Numba, which compiles them, is not installed"):
        amx.usable_tiles(CPU)
    assert machine.finds == 0


def test_the_system_may_refuse_it(machine: Machine) -> None:
    machine.is_permitted = False
    assert not amx.usable_tiles(CPU)
    assert set(amx.tile_refusals(CPU).values()) == {"the operating system does not permit them"}
    assert machine.finds == 0


def test_code_for_another_cpu_does_not_use_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert amx.tile_refusals(LLVMCpu("triple", "sapphirerapids", "")) == {}
    monkeypatch.setattr(amx, "this_cpu", lambda: replace(CPU, features="+avx2"))
    assert amx.tile_refusals(CPU) == {}
    assert machine.finds == 0


def test_the_variable_forbids_it_or_overrides_the_measurement(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = {"same_bits": True, "tiles": 1.0, "vectors": 2.0}
    machine.found = {"bfloat16": {"same_bits": False}, "int8": slow}
    assert not amx.usable_tiles(CPU)
    monkeypatch.setenv(amx.AMX_VARIABLE, "1")
    assert amx.usable_tiles(CPU) == {"int8"}
    monkeypatch.setenv(amx.AMX_VARIABLE, "0")
    assert set(amx.tile_refusals(CPU).values()) == {"NANOVLLM_AMX is 0"}
    monkeypatch.setenv(amx.AMX_VARIABLE, "yes")
    with pytest.raises(ValueError, match="NANOVLLM_AMX is 'yes'; set it to 0 or 1, or unset it"):
        amx.usable_tiles(CPU)


def test_what_cannot_be_used_is_not_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(amx.AMX_VARIABLE, "1")
    machine.is_permitted = False
    with pytest.raises(ValueError, match="NANOVLLM_AMX is 1, but bfloat16: the operating system"):
        amx.usable_tiles(CPU)
    monkeypatch.setattr(amx, "this_cpu", lambda: replace(CPU, features="+avx2"))
    with pytest.raises(ValueError, match="this CPU, or its hypervisor, shows no AMX; unset it"):
        amx.usable_tiles(CPU)


@pytest.mark.parametrize("choice", ["", "1"])
def test_the_variable_of_bfloat16_decides_about_its_tiles_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """So servers on different processors can be made to agree."""
    monkeypatch.setenv(amx.AMX_VARIABLE, choice)
    monkeypatch.setenv(BFLOAT16_VARIABLE, "float32")
    assert amx.usable_tiles(CPU) == {"int8"}
    assert amx.tile_refusals(CPU)["bfloat16"] == "NANOVLLM_BFLOAT16 is set"


def test_the_target_of_this_machine_uses_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "usable_tiles", lambda *_: {"int8"})
    host = host_target()
    assert (host.bfloat16_tiles, host.int8_tiles) == (False, host.lanes == 16)
    assert not host.emulates_tiles


def test_a_compilation_keeps_the_tiles_of_its_weights_only() -> None:
    both = KernelTarget(lanes=16, is_x86=True, bfloat16_tiles=True, int8_tiles=True)
    kept = {
        weights: Spec(both, weights, "bfloat16").essential.target
        for weights in ("float32", "bfloat16", "int8")
    }
    assert kept["float32"] == both.without_tiles
    assert kept["bfloat16"] == replace(both, int8_tiles=False)
    assert kept["int8"] == replace(both, bfloat16_tiles=False)


def test_a_target_with_tiles_takes_inputs_in_the_type_of_the_weights() -> None:
    tiles = KernelTarget(lanes=16, is_x86=True, bfloat16_tiles=True, int8_tiles=True)
    assert [tiles.input_type(kind) for kind in ("bfloat16", "int8")] == ["bfloat16", "int8"]
    plain = tiles.without_tiles
    assert [plain.input_type(kind) for kind in ("bfloat16", "int8")] == ["float32", "int16"]
    assert [tiles.panel_steps("int8", d_in) for d_in in (1, 64, 65)] == [16, 16, 32]
    assert [plain.panel_steps("int8", d_in) for d_in in (1, 64, 65)] == [1, 16, 17]


def test_random_tiles_reach_what_the_unit_does_to_denormals() -> None:
    random, flushed, rounded = np.random.default_rng(0), 0, 0
    for _ in range(8):
        inputs, weights, accumulators = amx.random_tiles("bfloat16", 16, random)
        result = multiply_add("bfloat16", accumulators, inputs, weights).view(np.float32)
        flushed += int((result == 0).sum())
        rounded += int((np.abs(result) > 1).sum())
    assert flushed > 0
    assert rounded > 0


@pytest.mark.skipif(host_cpu().triple[:6] != "x86_64", reason="x86 code")
@pytest.mark.parametrize("kind", amx.FEATURES)
def test_the_checked_code_can_be_compiled_anywhere(kind: str) -> None:
    features = ",".join(f"+{name}" for name in amx.FEATURES[kind])
    cpu = LLVMCpu(host_cpu().triple, "sapphirerapids", features)
    assert amx.emit_tiles(kind, cpu)


@pytest.mark.parametrize("kind", amx.FEATURES)
def test_this_machine_shows_the_bits_of_the_twin(kind: str) -> None:
    if kind not in amx.tile_refusals(host_cpu()) or not amx.request_permission():
        pytest.skip(f"this CPU, or its hypervisor, shows no AMX tiles of {kind}")
    assert amx.has_same_bits(kind)
    assert amx.measure_tiles(kind) > 1e9


@pytest.mark.parametrize("error", [0, 1])
@pytest.mark.parametrize("kind", amx.FEATURES)
def test_a_wrong_bit_of_the_unit_is_noticed(
    kind: str, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the twin in place of machine code, as the memory of `multiply` is laid out."""

    def multiply(address: int, _: int) -> int:
        words = (ctypes.c_uint32 * (4 * 16 * 16)).from_address(address)
        registers = np.ctypeslib.as_array(words).reshape(4, 16, 16)
        [rows] = [n for n in range(1, 17) if registers[0, 0].tobytes() == configuration(n)]
        assert address % 64 == 0
        sums = multiply_add(kind, registers[3, :rows], registers[1, :rows], registers[2])
        registers[3, :rows] = sums
        registers[3, rows - 1, 15] ^= error
        return 0

    library = SimpleNamespace(functions={"multiply": multiply})
    monkeypatch.setattr(amx, "emit_tiles", lambda _kind: b"")
    monkeypatch.setattr(amx, "Library", lambda _image, _names: library)
    assert amx.has_same_bits(kind) == (error == 0)
