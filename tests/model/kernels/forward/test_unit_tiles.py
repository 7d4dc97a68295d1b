"""Linear layers on the tile unit: emulated on every CPU, and the unit itself where there is one."""

import itertools
from typing import Any

import numpy as np
import pytest

from nanovllm.model.kernels.build.amx import FEATURES, INSTRUCTIONS
from nanovllm.model.kernels.build.codegen import LLVMCpu, create_target_machine, host_cpu
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled, link
from nanovllm.model.kernels.build.packing import pack_rows, round_up, to_bfloat16
from nanovllm.model.kernels.build.target import UNIT_STEPS, KernelTarget
from nanovllm.model.kernels.build.tile_twin import multiply_add
from nanovllm.model.kernels.forward.unit_tiles import make_unit_tiles
from nanovllm.model.kernels.simd.memory import load_int
from nanovllm.model.kernels.simd.rows import rows_at
from nanovllm.model.kernels.step_record import ROW_QUANT_BYTES
from tests.support.arrays import numbers, widened
from tests.support.products import products_of
from tests.support.targets import HOST, TILE_TARGETS

pytestmark = pytest.mark.slow(8)

MOST = 70
SHAPES = [(1, 1), (65, 130), (500, 70), (3700, 5)]
"""No multiple of a tile; one piece and several."""


def words_of(numbers: np.ndarray, per_word: int) -> np.ndarray:
    """Return rows [rows, d_in] as rows of words, zeros up to whole tiles."""
    padded = round_up(numbers.shape[1], per_word * UNIT_STEPS)
    whole = np.zeros((len(numbers), padded), dtype=numbers.dtype)
    whole[:, : numbers.shape[1]] = numbers
    return whole.view(np.uint32)


def twin(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the accumulators of a linear layer of bfloat16, from the NumPy twin of the unit."""
    inputs, columns = words_of(rows, 2), words_of(np.ascontiguousarray(weight.T), 2)
    accumulators = np.zeros((len(inputs), len(columns)), dtype=np.uint32)
    for step in range(0, inputs.shape[1], UNIT_STEPS):
        words = slice(step, step + UNIT_STEPS)
        weights = np.ascontiguousarray(columns[:, words].T)
        accumulators = multiply_add("bfloat16", accumulators, inputs[:, words], weights)
    return accumulators.view(np.float32)


def skip_without_unit(target: KernelTarget, kind: str) -> None:
    if not target.uses_tiles(kind):
        pytest.skip(f"this CPU, or its hypervisor, shows no AMX tiles of {kind}")


@pytest.mark.parametrize("target", TILE_TARGETS, ids=["emulated", "AMX"])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_bfloat16_has_the_bits_of_the_twin_in_any_batch(
    target: KernelTarget, d_in: int, d_out: int
) -> None:
    skip_without_unit(target, "bfloat16")
    rows, weight = to_bfloat16(numbers(MOST, d_in)), to_bfloat16(numbers(d_in, d_out, seed=1))
    rows[3, ::5] = 1  # denormal
    bias, product = numbers(d_out, seed=2), products_of(target)["bfloat16"]
    expected = twin(rows, weight) + bias
    exact = widened(rows).astype(np.float64) @ widened(weight).astype(np.float64) + bias
    np.testing.assert_allclose(expected, exact, rtol=0, atol=4e-5 * np.sqrt(d_in))
    for count, threads in itertools.product((1, 15, 16, 17, 33, 49, MOST), (1, 3)):
        out = product(rows[:count], weight, bias, threads=threads)
        np.testing.assert_array_equal(out[:, :d_out], expected[:count])
        assert not out[:, d_out:].any(), "what fills a row up must stay zero"
    for row in range(0, MOST, 9):
        alone = product(rows[row : row + 1], weight, bias)[0, :d_out]
        np.testing.assert_array_equal(alone, expected[row])


@pytest.mark.parametrize("target", TILE_TARGETS, ids=["emulated", "AMX"])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_int8_has_the_bits_of_the_dot_products(target: KernelTarget, d_in: int, d_out: int) -> None:
    skip_without_unit(target, "int8")
    random, width = np.random.default_rng(3), target.panel_width
    rows = random.integers(0, 256, (MOST, d_in), dtype=np.uint8)
    weight = random.integers(-127, 128, (d_in, d_out), dtype=np.int8)
    bias, row_quant = numbers(d_out, seed=2), numbers(MOST, ROW_QUANT_BYTES // 4, seed=4)
    row_quant[:, 1] = random.integers(0, 256, MOST, dtype=np.int32).view(np.float32)
    sums = np.zeros(round_up(d_out, width), dtype=np.int32)
    sums[:d_out] = weight.sum(axis=0, dtype=np.int32)
    extra: dict[str, Any] = {
        "column_scales": pack_rows([numbers(d_out, seed=5)], width),
        "column_sums": sums,
        "outlier_columns": np.zeros(3, dtype=np.int32),
        "outlier_weight": pack_rows(list(numbers(3, d_out, seed=6)), width),
    }
    unit, vectors = products_of(target)["int8"], products_of(HOST.without_tiles)["int8"]
    expected = vectors(rows, weight, bias, row_quant=row_quant, **extra)[:, :d_out]
    for count, threads in itertools.product((1, 2, 15, 16, 17, 33, 49, MOST), (1, 3)):
        given = {**extra, "row_quant": row_quant[:count]}
        out = unit(rows[:count], weight, bias, threads=threads, **given)
        np.testing.assert_array_equal(out[:, :d_out], expected[:count])


@pytest.mark.skipif(not HOST.is_x86, reason="LLVM generates x86 code from x86 types")
@pytest.mark.parametrize("kind", FEATURES)
def test_the_unit_is_configured_loaded_multiplied_stored_and_released(kind: str) -> None:
    """Code for a CPU that has the unit, which this one may not be able to run."""
    target = KernelTarget(lanes=16, is_x86=True, bfloat16_tiles=True, int8_tiles=True)
    tiles = make_unit_tiles(target, kind, 4, nontemporal=True)

    @compiled
    def run(p: int, _thread: int) -> None:
        inputs, panel, out = (
            rows_at(load_int(p, 0), 64),
            rows_at(load_int(p, 1), 256),
            rows_at(load_int(p, 2), 256),
        )
        tiles(inputs, panel, load_int(p, 3), out, load_int(p, 4), load_int(p, 5), load_int(p, 6))

    run.compile(ARGUMENTS)  # type: ignore[attr-defined]
    features = ",".join(f"+{name}" for name in FEATURES[kind])
    cpu = LLVMCpu(host_cpu().triple, "sapphirerapids", features)
    machine = create_target_machine(cpu)
    lines = machine.emit_assembly(link({"run": run}, machine)).splitlines()
    names, product = ("ldtilecfg", "tileloadd", "tilestored", "tilerelease"), INSTRUCTIONS[kind]
    code = [words for line in lines if (words := line.split()) and words[0] in {*names, product}]
    configure, load, store, release = names
    walk = [*[load] * 4, load, *[load, product] * 4]  # accumulators; inputs; weights, in turn
    sequence, begin = [words[0] for words in code], [words[0] for words in code].index(load)
    assert sequence[begin : begin + len(walk)] == walk
    assert sequence[0] == configure
    assert " ".join([store] * 4) in " ".join(sequence)
    assert release in sequence
    assert [words[1:] for words in code if words[0] == product][:4] == [
        [f"%tmm{weights},", "%tmm4,", f"%tmm{accumulators}"]  # inputs come first for Intel
        for accumulators, weights in enumerate((5, 6, 7, 5))
    ]
    assert sum("prefetchnta" in line for line in lines) >= 4 * UNIT_STEPS
