"""Networks without a part: by hand, with the right gradients, and the same on both backends."""

from dataclasses import replace

import numpy as np
import pytest
from jaxtyping import Float

from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.config import ABLATIONS, ModelConfig
from nanovllm.training.kernels.operations import CompiledOperations
from nanovllm.training.network.autograd import Tape
from nanovllm.training.network.model import Dropout, batch_loss, forward, next_logits
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.parameters import Parameters, initialize
from tests.training.network.test_model import random_parameters, random_tokens

OPERATIONS = NumpyOperations()
COMBINED = ("layer-norm,residual", "layer-norm,ffn", "residual,ffn,causal-mask,scaling,positions")


def ablated_config(parts: str) -> ModelConfig:
    names = tuple(parts.split(","))
    return ModelConfig(
        vocab=11,
        max_positions=8,
        d_model=12,
        layers=2,
        heads=3,
        d_ff=20,
        scale_attn_weights="scaling" not in names,
        ablated=names,
    )


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("parts", [*ABLATIONS, *COMBINED])
def test_gradients_are_those_of_finite_differences(parts: str, rate: float) -> None:
    config = ablated_config(parts)
    parameters = random_parameters(config, np.float64)
    inputs, targets = random_tokens(config, 2, 5)
    arguments = OPERATIONS, config, parameters, inputs, targets
    dropout = Dropout(rate, seed=3, step=4)
    batch_loss(*arguments, scale=0.1, dropout=dropout)
    gradients = parameters.views(parameters.gradients)
    step, generator = 1e-5, np.random.default_rng(2)
    for name, view in parameters.views(parameters.values).items():
        before, direction = view.copy(), generator.standard_normal(view.shape)
        losses = []
        for sign in (1.0, -1.0):
            view[...] = before + sign * step * direction
            losses.append(0.1 * batch_loss(*arguments, dropout=dropout))
        view[...] = before
        expected = (losses[0] - losses[1]) / (2 * step)
        assert (gradients[name] * direction).sum() == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("parts", [*[one for one in ABLATIONS if one != "causal-mask"], *COMBINED])
def test_the_backends_agree(parts: str) -> None:
    config = ablated_config(parts.replace("causal-mask,", ""))
    results = []
    for operations in (OPERATIONS, CompiledOperations(1)):
        parameters = random_parameters(config)
        batch = random_tokens(config, 3, 7)
        losses = [batch_loss(operations, config, parameters, *batch, scale=0.1) for _ in range(2)]
        assert losses[0] == losses[1]
        logits = next_logits(operations, config, parameters, [1, 2, 3])
        results.append((losses[0], parameters.gradients, logits))
        operations.close()
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for numpy_result, compiled in zip(results[0][1:], results[1][1:], strict=True):
        np.testing.assert_allclose(numpy_result, compiled, atol=1e-3)


def hidden_states(
    config: ModelConfig, parameters: Parameters, tokens: list[int]
) -> Float[np.ndarray, "tokens d_model"]:
    return forward(Tape(OPERATIONS), config, parameters, np.array([tokens])).data


def test_without_the_causal_mask_the_first_token_sees_the_last() -> None:
    for parts, is_equal in (("scaling", True), ("causal-mask", False)):
        config = ablated_config(parts)
        parameters = random_parameters(config)
        first = [hidden_states(config, parameters, [1, 2, 3, last])[0] for last in (4, 9)]
        assert np.array_equal(*first) is is_equal


def test_without_positions_one_layer_does_not_see_the_order() -> None:
    config = replace(ablated_config("positions"), layers=1)
    parameters = random_parameters(config)
    for is_equal in (False, True):
        first, second = (
            next_logits(OPERATIONS, config, parameters, one) for one in ([1, 2, 3], [2, 1, 3])
        )
        assert np.allclose(first, second, atol=1e-5) is is_equal
        parameters.tensors["wpe.weight"].data[...] = 0.0


def test_without_residuals_a_block_that_returns_zeros_loses_the_text() -> None:
    for parts, is_lost in (("scaling", False), ("residual", True)):
        config = ablated_config(parts)
        parameters = random_parameters(config)
        for name, tensor in parameters.tensors.items():
            if name.startswith("h.1.mlp.c_proj."):
                tensor.data[...] = 0.0
        first = [hidden_states(config, parameters, [token])[0] for token in (1, 2)]
        assert np.array_equal(*first) is is_lost


def test_without_layer_norm_a_larger_embedding_gives_larger_states() -> None:
    sizes = {}
    for parts in ("scaling", "layer-norm"):
        config = ablated_config(parts)
        parameters = random_parameters(config)
        parameters.tensors["wte.weight"].data[...] *= 100.0
        sizes[parts] = np.abs(hidden_states(config, parameters, [1, 2, 3])).max()
    assert sizes["layer-norm"] > 10 * sizes["scaling"]


def test_absent_positions_and_feed_forward_blocks_are_zeros_that_stay() -> None:
    config = ablated_config("positions,ffn")
    parameters = Parameters(expected_shapes(config), constant_positions=True)
    initialize(parameters, config, seed=0)
    batch_loss(OPERATIONS, config, parameters, *random_tokens(config, 2, 5), scale=1.0)
    assert parameters.gradients.any()
    for name, array in parameters.arrays().items():
        if ".mlp." in name or name == "wpe.weight":
            assert not array.any(), name
            gradient = parameters.tensors[name].gradient.array
            assert gradient is None or not gradient.any()
