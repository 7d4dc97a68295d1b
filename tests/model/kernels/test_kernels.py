"""Every kernel against its NumPy twin, at every vector width."""

from typing import Any

import numpy as np
import pytest

from nanovllm.model import activation, layernorm
from nanovllm.model.kernels.activation import ACTIVATIONS
from nanovllm.model.kernels.attention import make_softmax
from nanovllm.model.kernels.compiler import compiled
from nanovllm.model.kernels.epilogue import make_epilogue
from nanovllm.model.kernels.layernorm import make_layer_norm
from nanovllm.model.kernels.machine import host_lanes, panel_width
from nanovllm.model.kernels.matmul import make_product
from nanovllm.model.kernels.packing import aligned_zeros, pack_panels, pack_rows, round_up
from nanovllm.model.kernels.parameters import ACTIVATION_NAMES, ADD_TO_RESIDUAL, STORE

LANES = [16, 8, 4]


@pytest.fixture(scope="module", params=[lanes for lanes in LANES if lanes <= host_lanes()])
def lanes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def call(kernel: Any, count: int) -> Any:
    """A kernel can only be called by compiled code: a function of `count` integers that does nothing else."""

    def of_five(a: int, b: int, c: int, d: int, e: int) -> None:
        kernel(a, b, c, d, e)

    def of_six(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
        kernel(a, b, c, d, e, f)

    kinds: dict[int, Any] = {5: of_five, 6: of_six}
    return compiled(kinds[count])


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def product(lanes: int) -> Any:
    return make_product(lanes)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 13, 64, 65, 200])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (24, 72), (33, 130), (800, 70)])
def test_product_is_numpys(product: Any, lanes: int, count: int, d_in: int, d_out: int) -> None:
    rows, weight, bias = numbers(count, d_in), numbers(d_in, d_out, seed=1), numbers(d_out, seed=2)
    out = run_product(product, lanes, rows, weight, bias)
    expected = rows.astype(np.float64) @ weight.astype(np.float64) + bias
    np.testing.assert_allclose(out[:, :d_out], expected, rtol=0, atol=2e-5 * np.sqrt(d_in))
    assert not out[:, d_out:].any(), "what fills a row up must stay zero"


def run_product(product: Any, lanes: int, rows: np.ndarray, weight: np.ndarray, bias: np.ndarray, *, threads: int = 1) -> np.ndarray:
    """The product by each of `threads` shares in turn."""
    width = panel_width(lanes)
    panels, biases, work = pack_panels([weight], width), pack_rows([bias], width), np.zeros(8, dtype=np.int64)
    out = aligned_zeros(rows.shape[0] * biases.shape[1]).reshape(rows.shape[0], -1)
    scratch = aligned_zeros(96 * width)
    for thread in range(threads):
        product(
            thread, threads, work.ctypes.data, rows.ctypes.data, rows.strides[0], rows.shape[0], panels.ctypes.data, weight.shape[0],
            weight.shape[1], biases.ctypes.data, out.ctypes.data, out.strides[0], STORE, scratch.ctypes.data,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_rows_bits_depend_on_nothing_but_the_row(product: Any, lanes: int, threads: int) -> None:
    rows, weight, bias = numbers(130, 900), numbers(900, 150, seed=1), numbers(150, seed=2)
    alone = np.concatenate([run_product(product, lanes, rows[i : i + 1], weight, bias) for i in range(130)])
    for count in (2, 6, 61, 64, 65, 130):
        np.testing.assert_array_equal(run_product(product, lanes, rows[:count], weight, bias, threads=threads), alone[:count])


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_activations_are_numpys(lanes: int, name: str) -> None:
    values = np.concatenate([np.linspace(-12, 12, 480), [-1e4, -90, -30, -1e-6, -0.0, 0.0, 1e-6, 30, 90, 1e4], np.zeros(6)]).astype(np.float32)
    values = values[: round_up(values.size, 16)]
    out = np.empty_like(values)
    zeros = np.zeros_like(values)
    run = call(make_epilogue(lanes), 5)
    run(ACTIVATION_NAMES.index(name), values.ctypes.data, zeros.ctypes.data, out.ctypes.data, values.size)
    expected = getattr(activation, name)(values)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-6)
    assert {function.__name__ for function in activation.ACTIVATIONS.values()} == set(ACTIVATIONS)


def test_the_other_epilogues_add_bias_and_residual(lanes: int) -> None:
    sums, bias, residual = numbers(64), numbers(64, seed=1), numbers(64, seed=2)
    run = call(make_epilogue(lanes), 5)
    out = residual.copy()
    run(ADD_TO_RESIDUAL, sums.ctypes.data, bias.ctypes.data, out.ctypes.data, 64)
    np.testing.assert_array_equal(out, residual + (sums + bias))
    run(STORE, sums.ctypes.data, bias.ctypes.data, out.ctypes.data, 64)
    np.testing.assert_array_equal(out, sums + bias)


@pytest.mark.parametrize("d_model", [1, 5, 16, 24, 80, 768])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_layer_norm_is_numpys(lanes: int, d_model: int, mean: float) -> None:
    hidden, gain, bias = (
        pack_rows([values], 64)[0] for values in (numbers(d_model) + np.float32(mean), numbers(d_model, seed=1), numbers(d_model, seed=2))
    )
    out, epsilon = aligned_zeros(hidden.size), np.array([1e-5], dtype=np.float32)
    run = call(make_layer_norm(lanes), 6)
    run(hidden.ctypes.data, gain.ctypes.data, bias.ctypes.data, out.ctypes.data, d_model, epsilon.ctypes.data)
    expected = layernorm.layer_norm(hidden[None, :d_model], gain[:d_model], bias[:d_model], 1e-5)[0]
    np.testing.assert_allclose(out[:d_model], expected, rtol=1e-4, atol=1e-3 if mean else 1e-5)
    assert not out[d_model:].any()


@pytest.mark.parametrize(("visible", "blocks"), [(1, 1), (7, 1), (8, 3), (9, 2), (23, 3)])
def test_softmax_masks_what_is_not_there(lanes: int, visible: int, blocks: int) -> None:
    block_size, columns = 8, round_up(8, lanes)
    scores = np.full((blocks, columns), np.nan, dtype=np.float32)
    scores[:, :block_size] = numbers(blocks, block_size)
    expected = np.zeros((blocks, columns))
    seen = scores[:, :block_size].reshape(-1)[:visible].astype(np.float64) * 0.5
    weights = np.exp(seen - seen.max()) / np.exp(seen - seen.max()).sum()
    expected[:, :block_size].reshape(-1)[:visible] = 0.0
    padded = np.zeros(blocks * block_size)
    padded[:visible] = weights
    expected[:, :block_size] = padded.reshape(blocks, block_size)
    scores[:, :block_size].reshape(-1)[visible:] = np.nan
    run, scale = call(make_softmax(lanes), 6), np.array([0.5], dtype=np.float32)
    run(scores.ctypes.data, visible, blocks, block_size, columns, scale.ctypes.data)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)
    assert (scores[expected == 0] == 0).all(), "a masked weight is exactly zero"
