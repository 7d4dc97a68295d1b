"""The kernels of a row against their NumPy twins, at every vector width and in every type."""

import numpy as np
import pytest

from nanovllm.model import activation
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled
from nanovllm.model.kernels.build.packing import (
    aligned_zeros,
    pack_rows,
    round_up,
    to_bfloat16,
)
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.simd.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    LINEAR_RECORD,
    RESIDUAL,
    STORE,
)
from nanovllm.model.layers import layer_norm, rms_norm
from nanovllm.model.rotary import Rotary, turn
from nanovllm.model.weights import LayerNorm
from tests.support.arrays import as_int16_inputs, numbers, widened
from tests.support.kernel_entries import row_kernels

pytestmark = pytest.mark.slow(15)


def call(target: KernelTarget, name: str, *values: int) -> None:
    """Call a kernel for a row."""
    row_kernels(target)(name, *values)


def test_rounding_to_bfloat16_is_packings(target: KernelTarget) -> None:
    values = np.concatenate(
        [numbers(77), [0.0, -0.0, 1e-40, 3e38, np.inf, -np.inf, 1.00390625, 1.01171875]]
    ).astype(np.float32)
    out = np.zeros(values.size + 1, dtype=np.uint16)
    call(target, "round_row", values.ctypes.data, out.ctypes.data, values.size)
    np.testing.assert_array_equal(out[:-1], to_bfloat16(values))
    assert out[-1] == 0, "exactly so many are written"
    back = np.zeros(round_up(values.size, 16), dtype=np.float32)
    padded = np.resize(out, 96)
    call(target, "widen_row", padded.ctypes.data, back.ctypes.data, values.size)
    np.testing.assert_array_equal(back[: values.size], widened(out[:-1]))


@pytest.mark.parametrize("count", [1, 5, 16, 100])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_rows_of_bytes_are_numpys(target: KernelTarget, count: int, shift: float) -> None:
    source, factors = aligned_zeros(112), aligned_zeros(112)
    source[:count], factors[:count] = numbers(count) + np.float32(shift), numbers(count, seed=1)
    is_wide = target.input_type("int8") == "int16"
    out = np.zeros(112, dtype=np.uint16 if is_wide else np.uint8)
    row_quant = np.zeros(32, dtype=np.float32)
    arguments = (
        source.ctypes.data,
        factors.ctypes.data,
        out.ctypes.data,
        row_quant.ctypes.data,
        count,
    )
    call(target, "quantize_row", *arguments)
    values = source[:count] * factors[:count]
    extent = np.float32(max(values.max(), 0) - min(values.min(), 0))
    inverse = np.float32(255) / extent
    zero_point = np.rint(-np.minimum(values.min(), np.float32(0)) * inverse)
    expected = np.clip(np.rint(values * inverse) + zero_point, 0, 255)
    offset = target.int8_offset
    assert row_quant[1:2].view(np.int32) == zero_point - offset
    codes = (as_int16_inputs(out) if is_wide else out)[:count]  # the order is its own inverse
    codes = np.add(codes, offset, dtype=codes.dtype)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(
        (codes - zero_point) * row_quant[0], values, rtol=0, atol=0.51 * float(extent) / 255
    )
    source[0] = np.nan
    call(target, "quantize_row", *arguments)
    assert np.isnan(row_quant[0]), "a row that is not finite must not look as if it were"
    source[:] = 0.0
    call(target, "quantize_row", *arguments)
    assert row_quant[0] == 0
    assert (out[:count] == (-offset) % 256).all()


@pytest.mark.parametrize("count", [1, 5, 64])
def test_signed_bytes_are_numpys(target: KernelTarget, count: int) -> None:
    source, out, scale = numbers(64), np.zeros(64, dtype=np.int8), np.zeros(1, dtype=np.float32)
    call(target, "quantize_signed", source.ctypes.data, out.ctypes.data, scale.ctypes.data, count)
    largest = np.abs(source[:count]).max()
    np.testing.assert_array_equal(
        out[:count], np.rint(source[:count] * (np.float32(127) / largest))
    )
    assert not out[count:].any()
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)


@pytest.mark.parametrize(("per_word", "dtype"), [(1, np.uint32), (2, np.uint16), (4, np.uint8)])
def test_a_word_is_filled_place_by_place(target: KernelTarget, per_word: int, dtype: type) -> None:
    words = np.full(32, 0xFFFFFFFF, dtype=np.uint32)
    random = np.random.default_rng(0)
    rows = [random.integers(0, np.iinfo(dtype).max, 32, dtype=dtype) for _ in range(per_word)]
    for place, row in enumerate(rows):
        call(target, f"pack_value_row_{per_word}", row.ctypes.data, words.ctypes.data, place, 32)
        np.testing.assert_array_equal(
            words.view(dtype).reshape(32, per_word)[:, : place + 1].T, rows[: place + 1]
        )
        assert not words.view(dtype).reshape(32, per_word)[:, place + 1 :].any(), (
            "what comes after a new token is zero"
        )


def test_without_fused_multiply_add_nothing_is_called_for_it() -> None:
    """A processor without the instruction would call the C library for every lane."""
    values = np.linspace(-80, 80, 64, dtype=np.float32)
    for has_fma in (True, False):
        target = KernelTarget(lanes=4, has_fma=has_fma)

        def exponentiate(v: Vectors, numbers: Value, out: Value, count: Value) -> None:
            with v.range(count, v.lanes) as i:
                v.store(v.exp(v.load(v.element(numbers, i))), v.element(out, i))

        exp = kernel(target, exponentiate)

        @compiled
        def run(address: int, out: int) -> None:
            exp(address, out, 64)  # noqa: B023 - called at once

        out = np.zeros_like(values)
        run(values.ctypes.data, out.ctypes.data)
        np.testing.assert_allclose(out, np.exp(values.astype(np.float64)), rtol=3e-7)
        run.compile(ARGUMENTS)  # type: ignore[attr-defined]
        code = run.inspect_llvm(ARGUMENTS)  # type: ignore[attr-defined]
        assert ("llvm.fma" in code) == has_fma


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_are_numpys(target: KernelTarget, name: str) -> None:
    values = np.concatenate(
        [
            np.linspace(-12, 12, 480),
            [-1e4, -90, -30, -1e-6, -0.0, 0.0, 1e-6, 30, 90, 1e4],
            np.zeros(6),
        ]
    ).astype(np.float32)
    values = np.resize(values, 512)
    out = np.concatenate(
        [
            finish(target, ACTIVATION_NAMES.index(name), part)
            for part in np.split(values, values.size // target.panel_width)
        ]
    )
    expected = getattr(activation, name)(values)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)
    assert {function.name for function in activation.ACTIVATIONS.values()} == set(ACTIVATIONS)


def finish(
    target: KernelTarget,
    kind: int,
    sums: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return one row of one panel after a float32 epilogue."""
    bias = np.zeros_like(sums) if bias is None else bias
    out = np.zeros_like(sums) if out is None else out
    linear = np.zeros(1, dtype=LINEAR_RECORD)
    linear["bias_ptr"] = bias.ctypes.data
    call(target, "finish", kind, sums.ctypes.data, linear.ctypes.data, out.ctypes.data)
    return out


def test_the_other_epilogues_add_bias_and_residual(target: KernelTarget) -> None:
    width = target.panel_width
    sums, bias, residual = numbers(width), numbers(width, seed=1), numbers(width, seed=2)
    np.testing.assert_array_equal(
        finish(target, RESIDUAL, sums, bias=bias, out=residual.copy()),
        residual + (sums + bias),
    )
    np.testing.assert_array_equal(finish(target, STORE, sums, bias=bias), sums + bias)


@pytest.mark.parametrize("d_model", [1, 5, 16, 24, 80, 768])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("is_rms", [False, True])
def test_norms_are_numpys(target: KernelTarget, d_model: int, mean: float, *, is_rms: bool) -> None:
    hidden, gain, bias = (
        pack_rows([values], 64)[0]
        for values in (
            numbers(d_model) + np.float32(mean),
            numbers(d_model, seed=1),
            numbers(d_model, seed=2) * (not is_rms),
        )
    )
    out, epsilon = aligned_zeros(hidden.size), np.array([1e-5], dtype=np.float32)
    call(
        target,
        "normalize_row",
        hidden.ctypes.data,
        gain.ctypes.data,
        bias.ctypes.data,
        out.ctypes.data,
        d_model,
        epsilon.ctypes.data,
        is_rms,
    )
    row, norm = hidden[None, :d_model], LayerNorm(gain[:d_model], bias[:d_model])
    expected = rms_norm(row, norm.gain, 1e-5)[0] if is_rms else layer_norm(row, norm, 1e-5)[0]
    np.testing.assert_allclose(out[:d_model], expected, rtol=1e-4, atol=1e-3 if mean else 1e-5)
    assert not out[d_model:].any()


@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 80, 128])
def test_heads_are_normalized_and_turned_as_in_numpy(target: KernelTarget, head_dim: int) -> None:
    rotary, gain = Rotary(theta=50.0), numbers(head_dim, seed=1)
    heads, epsilon = numbers(3, head_dim), np.array([1e-5], dtype=np.float32)
    angles = rotary.angles(np.array([7]), head_dim)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    before, expected = heads.copy(), rms_norm(heads[None, 1:2], gain, 1e-5)
    head_ptr = heads[1:].ctypes.data
    call(target, "normalize_head", head_ptr, gain.ctypes.data, head_dim, epsilon.ctypes.data)
    np.testing.assert_allclose(heads[1], expected[0, 0], rtol=1e-5, atol=1e-6)
    expected = turn(heads[None, 1:2], angles)[0, 0]
    call(target, "turn_head", head_ptr, table.ctypes.data, head_dim // 2)
    np.testing.assert_allclose(heads[1], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(heads[::2], before[::2])


@pytest.mark.parametrize(
    ("unseen", "visible", "blocks"),
    [(0, 1, 1), (0, 7, 1), (0, 8, 3), (0, 9, 2), (0, 23, 3), (3, 7, 1), (8, 9, 2), (13, 23, 3)],
)
def test_softmax_masks_what_is_not_there(
    target: KernelTarget, unseen: int, visible: int, blocks: int
) -> None:
    block_size, columns = 8, round_up(8, target.lanes)
    scores = np.full((blocks, columns), np.nan, dtype=np.float32)
    scores[:, :block_size] = numbers(blocks, block_size)
    expected = np.zeros((blocks, columns))
    seen = scores[:, :block_size].reshape(-1)[unseen:visible].astype(np.float64) * 0.5
    weights = np.exp(seen - seen.max())
    padded = np.zeros(blocks * block_size)
    padded[unseen:visible] = weights
    expected[:, :block_size] = padded.reshape(blocks, block_size)
    scores[:, :block_size].reshape(-1)[visible:] = np.nan
    narrow, scale, inv_sum = (
        scores.copy(),
        np.array([0.5], dtype=np.float32),
        np.zeros(1, dtype=np.float32),
    )
    sizes = (unseen, visible, blocks, block_size, columns, scale.ctypes.data, inv_sum.ctypes.data)
    call(target, "softmax", scores.ctypes.data, *sizes)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(inv_sum[0] * weights.sum(), 1, rtol=1e-6)
    assert (scores[expected == 0] == 0).all(), "a masked weight is exactly zero"
    inv_sum[:] = 0
    call(target, "softmax_to_bfloat16", narrow.ctypes.data, *sizes)
    np.testing.assert_array_equal(
        narrow.view(np.uint16).reshape(-1)[: scores.size], to_bfloat16(scores).reshape(-1)
    )
    np.testing.assert_allclose(inv_sum[0] * weights.sum(), 1, rtol=1e-6)
