"""Every kernel against its NumPy twin, at every vector width and in every type."""

import itertools
from functools import cache
from threading import Thread
from typing import Any

import numpy as np
import pytest

from nanovllm.model import activation, gpt2
from nanovllm.model.kernels.build.compiler import ARGUMENTS, compiled
from nanovllm.model.kernels.build.layout import JOB, PHASE_BYTES, THREAD_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import (
    aligned_zeros,
    pack_panels,
    pack_rows,
    round_up,
    to_bfloat16,
)
from nanovllm.model.kernels.build.target import PER_WORD, KernelTarget
from nanovllm.model.kernels.simd.activation import ACTIVATIONS
from nanovllm.model.kernels.simd.kernel import kernel
from nanovllm.model.kernels.simd.value import Value
from nanovllm.model.kernels.simd.vector import Vectors
from nanovllm.model.kernels.step_record import (
    ACTIVATION_NAMES,
    LINEAR_RECORD,
    RESIDUAL,
    ROW_QUANT_BYTES,
    ROW_QUANT_OUTLIERS,
    STEP_RECORD,
    STORE,
)
from nanovllm.model.kernels.threads.os_wait import prepare_lock
from nanovllm.model.weights import LayerNorm
from tests.support.kernel_entries import linear_kernel, row_kernels
from tests.support.targets import TARGETS, WIDTHS

pytestmark = pytest.mark.slow(35)


def name_of(target: KernelTarget) -> str:
    dots = f"{'-dot' * target.bfloat16_dot}{'-bytes' * target.int8_dot}"
    return f"{target.lanes}{'-x86' * target.is_x86}{dots}"


@pytest.fixture(scope="module", params=WIDTHS, ids=name_of)
def target(request: pytest.FixtureRequest) -> KernelTarget:
    kernel_target = request.param
    assert isinstance(kernel_target, KernelTarget)
    return kernel_target


def call(target: KernelTarget, name: str, *values: int) -> None:
    """Call a kernel for a row."""
    row_kernels(target)(name, *values)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


RESIDUAL_VALUE, BESIDE = np.float32(3.0), np.float32(-7.0)


class Product:
    """A linear layer of one type of weights, called with arrays."""

    def __init__(self, target: KernelTarget, kind: str) -> None:
        self.target, self.kind = target, kind
        self.run = linear_kernel(target, kind)
        self._packed: tuple[np.ndarray, np.ndarray] | None = (
            None  # the last call's weight and its panels: the next call often has the same one
        )

    def _panels(self, weight: np.ndarray) -> np.ndarray:
        if self._packed is None or self._packed[0] is not weight:
            self._packed = weight, pack_panels(weight, self.target.panel_width)
        return self._packed[1]

    def __call__(
        self,
        rows: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        *,
        threads: int = 1,
        epilogue: int = STORE,
        **extra: np.ndarray,
    ) -> np.ndarray:
        """Compute by `threads` threads; `extra` are arrays of the layer's record and `row_quant`.

        The outputs that the RESIDUAL epilogue adds to are all RESIDUAL_VALUE.
        """
        width = self.target.panel_width
        row_quant = extra.pop(
            "row_quant", np.zeros((rows.shape[0], ROW_QUANT_BYTES // 4), dtype=np.float32)
        )
        panels, biases, job = (
            self._panels(weight),
            pack_rows([bias], width),
            aligned_zeros((JOB.itemsize + threads * THREAD_BYTES + PHASE_BYTES) // 4),
        )
        scratch, linear, record = (
            aligned_zeros(threads * 96 * width),
            np.zeros(1, dtype=LINEAR_RECORD),
            np.zeros(1, dtype=STEP_RECORD),
        )
        linear["steps"], linear["panels"] = panels.shape[1], panels.shape[0]
        linear["weight_ptr"], linear["bias_ptr"] = panels.ctypes.data, biases.ctypes.data
        if "outlier_columns" in extra:
            linear["outliers"] = extra["outlier_columns"].size
        for name, array in extra.items():
            linear[f"{name}_ptr"] = array.ctypes.data
        record["threads"], record["scratch_ptr"] = threads, scratch.ctypes.data
        record["scratch_bytes"] = 96 * width * WORD_BYTES
        record["linears_ptr"], record["row_quant_ptr"] = linear.ctypes.data, row_quant.ctypes.data
        record["job_ptr"] = job.ctypes.data
        record["phases_ptr"] = job.ctypes.data + JOB.itemsize + threads * THREAD_BYTES
        prepare_lock(job.ctypes.data)
        padded = np.zeros(
            (rows.shape[0], round_up(rows.shape[1], PER_WORD[self.kind])), dtype=rows.dtype
        )
        padded[:, : rows.shape[1]] = rows
        out = aligned_zeros(rows.shape[0] * (biases.shape[1] + 16)).reshape(rows.shape[0], -1)
        out[:], out[:, -16:] = RESIDUAL_VALUE if epilogue == RESIDUAL else 0, BESIDE

        values = np.array(
            [
                record.ctypes.data, rows.shape[0], padded.ctypes.data, padded.strides[0],
                out.ctypes.data, out.strides[0], epilogue,
            ],
            dtype=np.int64,
        )  # fmt: skip

        def share(thread: int) -> None:
            assert self.run(values.ctypes.data, thread) == 0

        others = [Thread(target=share, args=(number,)) for number in range(1, threads)]
        for other in others:
            other.start()
        share(0)
        for other in others:
            other.join(20)
            assert not other.is_alive()
        assert (out[:, -16:] == BESIDE).all(), "rows are as long as all panels, and no longer"
        return out[:, :-16]


class Products(dict[str, Product]):
    """The linear layers of a target by type of weights, each compiled when it is first used."""

    def __init__(self, target: KernelTarget) -> None:
        super().__init__()
        self._target = target

    def __missing__(self, kind: str) -> Product:
        self[kind] = Product(self._target, kind)
        return self[kind]


@cache
def products_of(target: KernelTarget) -> Products:
    return Products(target)


@pytest.fixture(scope="module")
def products(target: KernelTarget) -> dict[str, Product]:
    return products_of(target)


@pytest.fixture(scope="module", params=TARGETS, ids=name_of)
def dot_products(request: pytest.FixtureRequest) -> dict[str, Product]:
    """Linear layers of every target: targets of one width differ in their dot products."""
    return products_of(request.param)


SHAPES = [(1, 1), (24, 72), (33, 130), (800, 70)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13, 64, 65, 200])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_product_is_numpys(products: dict[str, Product], count: int, d_in: int, d_out: int) -> None:
    rows, weight, bias = numbers(count, d_in), numbers(d_in, d_out, seed=1), numbers(d_out, seed=2)
    out = products["float32"](rows, weight, bias)
    expected = rows.astype(np.float64) @ weight.astype(np.float64) + bias
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=0, atol=2e-5 * np.sqrt(d_in))
    assert not out[:, d_out:].any(), "what fills a row up must stay zero"


@pytest.mark.parametrize("count", [1, 7, 65])
@pytest.mark.parametrize(("d_in", "d_out"), [*SHAPES, (3001, 5)])
def test_product_of_bfloat16_is_that_of_the_rounded_numbers(
    dot_products: dict[str, Product], count: int, d_in: int, d_out: int
) -> None:
    rows, weight, bias = (
        to_bfloat16(numbers(count, d_in)),
        to_bfloat16(numbers(d_in, d_out, seed=1)),
        numbers(d_out, seed=2),
    )
    out = dot_products["bfloat16"](rows, weight, bias)
    expected = widened(rows).astype(np.float64) @ widened(weight).astype(np.float64) + bias
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=0, atol=4e-5 * np.sqrt(d_in))


@pytest.mark.parametrize("count", [1, 7, 65])
@pytest.mark.parametrize(("d_in", "d_out"), [*SHAPES, (3300, 5)])
@pytest.mark.parametrize("outliers", [0, 1, 16])
def test_product_of_bytes_is_exact_but_for_its_scales(
    dot_products: dict[str, Product], count: int, d_in: int, d_out: int, outliers: int
) -> None:
    width, random = dot_products["int8"].target.panel_width, np.random.default_rng(3)
    rows = random.integers(0, 256, (count, d_in), dtype=np.uint8)
    weight = random.integers(-127, 128, (d_in, d_out), dtype=np.int8)
    scales, row_scales, zero_points = (
        numbers(d_out, seed=4),
        numbers(count, seed=5),
        random.integers(0, 256, count, dtype=np.int32),
    )
    sides, outlier_weight = (
        numbers(count, outliers, seed=6),
        numbers(max(outliers, 1), d_out, seed=7),
    )
    row_quant = np.zeros((count, ROW_QUANT_BYTES // 4), dtype=np.float32)
    row_quant[:, 0], row_quant[:, 1] = row_scales, zero_points.view(np.float32)
    row_quant[:, ROW_QUANT_OUTLIERS : ROW_QUANT_OUTLIERS + outliers] = sides
    sums = np.zeros(round_up(d_out, width), dtype=np.int32)
    sums[:d_out] = weight.sum(axis=0, dtype=np.int32)
    bias = numbers(d_out, seed=2)
    out = dot_products["int8"](
        rows, weight, bias, row_quant=row_quant, column_sums=sums,
        column_scales=pack_rows([scales], width),
        outlier_columns=np.zeros(outliers, dtype=np.int32),
        outlier_weight=pack_rows(list(outlier_weight), width),
    )  # fmt: skip
    exact = (rows.astype(np.int64) - zero_points[:, None]) @ weight.astype(np.int64)
    expected = (
        exact * (row_scales[:, None].astype(np.float64) * scales)
        + sides.astype(np.float64) @ outlier_weight[:outliers]
        + bias
    )
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 6, 13, 14, 26, 97])
def test_rows_are_finished_as_their_layer_says(products: dict[str, Product], count: int) -> None:
    """Short panels finish a few rows at a time, long ones all rows together."""
    for d_in in (40, 1700):
        rows, weight, bias = (
            numbers(count, d_in),
            numbers(d_in, 70, seed=1) / np.float32(d_in),
            numbers(70, seed=2),
        )
        stored = products["float32"](rows, weight, bias)[:, :70]
        added = products["float32"](rows, weight, bias, epilogue=RESIDUAL)[:, :70]
        np.testing.assert_array_equal(added, RESIDUAL_VALUE + stored)
        activated = products["float32"](
            rows, weight, bias, epilogue=ACTIVATION_NAMES.index("relu")
        )[:, :70]
        np.testing.assert_array_equal(activated, np.maximum(stored, 0))
        narrow = to_bfloat16(rows), to_bfloat16(weight)
        stored = products["bfloat16"](*narrow, bias)[:, :70]
        activated = products["bfloat16"](*narrow, bias, epilogue=ACTIVATION_NAMES.index("relu"))
        np.testing.assert_array_equal(
            np.ascontiguousarray(activated).view(np.uint16)[:, :70],
            to_bfloat16(np.maximum(stored, 0)),
        )


@pytest.mark.parametrize("d_in", [500, 3700])
@pytest.mark.parametrize("kind", PER_WORD)
def test_a_rows_bits_depend_on_nothing_but_the_row(
    products: dict[str, Product], kind: str, d_in: int
) -> None:
    most = 130
    rows, weight, bias = numbers(most, d_in), numbers(d_in, 150, seed=1), numbers(150, seed=2)
    extra: dict[str, Any] = {}
    row_quant = np.zeros((most, ROW_QUANT_BYTES // 4), dtype=np.float32)
    if kind == "bfloat16":
        rows, weight = to_bfloat16(rows), to_bfloat16(weight)
    elif kind == "int8":
        random, width = np.random.default_rng(3), products[kind].target.panel_width
        rows, weight = (
            random.integers(0, 256, rows.shape, dtype=np.uint8),
            random.integers(-127, 128, weight.shape, dtype=np.int8),
        )
        row_quant = numbers(*row_quant.shape, seed=4)
        row_quant[:, 1] = random.integers(0, 256, most, dtype=np.int32).view(np.float32)
        extra = {
            "column_scales": pack_rows([numbers(150, seed=5)], width),
            "column_sums": np.full(round_up(150, width), 9, dtype=np.int32),
            "outlier_columns": np.zeros(3, dtype=np.int32),
            "outlier_weight": pack_rows(list(numbers(3, 150, seed=6)), width),
        }  # fmt: skip

    def product(begin: int, end: int, threads: int) -> np.ndarray:
        given: dict[str, Any] = {**extra, "row_quant": row_quant[begin:end]} if extra else {}
        return products[kind](rows[begin:end], weight, bias, threads=threads, **given)

    alone = np.concatenate([product(row, row + 1, 1) for row in range(most)])
    for count, threads in itertools.product(
        (2, 6, 12, 13, 14, 24, 25, 61, 64, 65, 96, 97, most), (1, 2, 3, 7)
    ):
        np.testing.assert_array_equal(product(0, count, threads), alone[:count])


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
    out, row_quant = np.zeros(112, dtype=np.uint8), np.zeros(32, dtype=np.float32)
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
    assert row_quant[1:2].view(np.int32) == zero_point
    np.testing.assert_array_equal(out[:count], expected)
    np.testing.assert_allclose(
        (out[:count] - zero_point) * row_quant[0], values, rtol=0, atol=0.51 * float(extent) / 255
    )
    source[0] = np.nan
    call(target, "quantize_row", *arguments)
    assert np.isnan(row_quant[0]), "a row that is not finite must not look as if it were"
    source[:] = 0.0
    call(target, "quantize_row", *arguments)
    assert row_quant[0] == 0
    assert not out[:count].any()


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
def test_layer_norm_is_numpys(target: KernelTarget, d_model: int, mean: float) -> None:
    hidden, gain, bias = (
        pack_rows([values], 64)[0]
        for values in (
            numbers(d_model) + np.float32(mean),
            numbers(d_model, seed=1),
            numbers(d_model, seed=2),
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
    )
    expected = gpt2.layer_norm(
        hidden[None, :d_model], LayerNorm(gain[:d_model], bias[:d_model]), 1e-5
    )[0]
    np.testing.assert_allclose(out[:d_model], expected, rtol=1e-4, atol=1e-3 if mean else 1e-5)
    assert not out[d_model:].any()


@pytest.mark.parametrize(("visible", "blocks"), [(1, 1), (7, 1), (8, 3), (9, 2), (23, 3)])
def test_softmax_masks_what_is_not_there(target: KernelTarget, visible: int, blocks: int) -> None:
    block_size, columns = 8, round_up(8, target.lanes)
    scores = np.full((blocks, columns), np.nan, dtype=np.float32)
    scores[:, :block_size] = numbers(blocks, block_size)
    expected = np.zeros((blocks, columns))
    seen = scores[:, :block_size].reshape(-1)[:visible].astype(np.float64) * 0.5
    weights = np.exp(seen - seen.max())
    expected[:, :block_size].reshape(-1)[:visible] = 0.0
    padded = np.zeros(blocks * block_size)
    padded[:visible] = weights
    expected[:, :block_size] = padded.reshape(blocks, block_size)
    scores[:, :block_size].reshape(-1)[visible:] = np.nan
    narrow, scale, inv_sum = (
        scores.copy(),
        np.array([0.5], dtype=np.float32),
        np.zeros(1, dtype=np.float32),
    )
    sizes = (visible, blocks, block_size, columns, scale.ctypes.data, inv_sum.ctypes.data)
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
