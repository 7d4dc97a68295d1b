"""The training forward pass: the same function as the server's, with the right gradients."""

from typing import Any

import numpy as np
import pytest

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import build_tree, expected_shapes
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward as serve
from nanovllm.model.kv_cache import KVCache
from nanovllm.training.network import model
from nanovllm.training.network.autograd import Tape
from nanovllm.training.network.model import Dropout, batch_loss, forward
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.parameters import (
    INITIAL_STD,
    Parameters,
    initialize,
    is_decayed,
    sinusoidal_positions,
)

OPERATIONS = NumpyOperations()


def small_config(**changes: object) -> ModelConfig:
    sizes = {"vocab": 11, "max_positions": 8, "d_model": 12, "layers": 2, "heads": 3, "d_ff": 20}
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def random_parameters(config: ModelConfig, dtype: type[np.floating] = np.float32) -> Parameters:
    parameters = Parameters(expected_shapes(config), dtype=dtype)
    generator = np.random.default_rng(0)
    for tensor in parameters.tensors.values():
        tensor.data[...] = 0.3 * generator.standard_normal(tensor.data.shape)
    return parameters


def random_tokens(config: ModelConfig, batch: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, config.vocab, (batch, context + 1))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False, "activation": "relu"},
        {"scale_attn_by_inverse_layer_idx": True, "activation": "gelu"},
    ],
)
def test_training_and_serving_compute_the_same_function(changes: dict[str, object]) -> None:
    config = small_config(**changes)
    parameters = random_parameters(config)
    inputs, _ = random_tokens(config, 1, 8)
    weights = build_tree(parameters.arrays(), config)
    cache = KVCache.allocate(config, blocks=1, block_size=8)
    served = serve(config, weights, ForwardBatch.single(inputs[0], all_rows=True), cache)
    trained = forward(Tape(OPERATIONS), config, parameters, inputs).data
    np.testing.assert_allclose(trained, served, atol=1e-5)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gradients_of_all_parameters(tied_head: bool, rate: float) -> None:
    config = small_config(tied_head=tied_head)
    parameters = random_parameters(config, np.float64)
    inputs, targets = random_tokens(config, 2, 5)
    arguments = OPERATIONS, config, parameters, inputs, targets
    dropout = Dropout(rate, seed=3, step=4)

    def loss() -> float:
        return 0.1 * batch_loss(*arguments, dropout=dropout)

    total = batch_loss(*arguments, scale=0.1, dropout=dropout)
    assert 0.1 * total == pytest.approx(loss(), rel=1e-12)
    # along a random direction in each parameter, so that every element counts
    step, generator = 1e-5, np.random.default_rng(2)
    gradients = parameters.views(parameters.gradients)
    for name, view in parameters.views(parameters.values).items():
        before, direction = view.copy(), generator.standard_normal(view.shape)
        view[...] = before + step * direction
        above = loss()
        view[...] = before - step * direction
        below = loss()
        view[...] = before
        expected = (above - below) / (2 * step)
        assert (gradients[name] * direction).sum() == pytest.approx(expected, abs=1e-6), name


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_groups_of_sequences_add_up_to_the_batch(
    monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """Without dropout to the same sums; with it, each group has masks of its own."""
    config = small_config()
    inputs, targets = random_tokens(config, 5, 5)
    inputs[1:], targets[1:] = inputs[0], targets[0]
    losses, gradients = [], []
    for group_tokens in (100, 10, 1):
        monkeypatch.setattr(model, "GROUP_TOKENS", group_tokens)
        parameters = random_parameters(config, np.float64)
        arguments = OPERATIONS, config, parameters, inputs, targets
        loss = batch_loss(*arguments, scale=0.05, dropout=Dropout(rate))
        assert loss == pytest.approx(batch_loss(*arguments, dropout=Dropout(rate)), rel=1e-12)
        losses.append(loss)
        gradients.append(parameters.gradients)
    if rate:
        first = batch_loss(
            OPERATIONS, config, parameters, inputs[:1], targets[:1], dropout=Dropout(rate)
        )
        assert abs(losses[2] / 5 - first) > 1e-3
    else:
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
        np.testing.assert_allclose(gradients[1:], [gradients[0]] * 2, atol=1e-12)


def test_evaluation_computes_no_slope() -> None:
    class Recording(NumpyOperations):
        def linear(self, *arguments: Any, **options: Any) -> tuple[np.ndarray, np.ndarray | None]:
            out, slope = super().linear(*arguments, **options)
            slopes.append(slope is not None)
            return out, slope

    config = small_config(layers=1)
    parameters = random_parameters(config)
    batch = random_tokens(config, 2, 8)
    for scale, expected in ((None, [False] * 4), (1.0, [False, False, True, False])):
        slopes: list[bool] = []
        batch_loss(Recording(), config, parameters, *batch, scale=scale)
        assert slopes == expected


def test_initial_weights_are_those_of_gpt2() -> None:
    config = small_config(vocab=300, d_model=96, layers=8, d_ff=384)
    parameters = Parameters(expected_shapes(config))
    initialize(parameters, config, seed=0)
    arrays = parameters.arrays()
    assert arrays["wte.weight"].std() == pytest.approx(INITIAL_STD, rel=0.05)
    assert arrays["h.3.mlp.c_fc.weight"].std() == pytest.approx(INITIAL_STD, rel=0.05)
    assert arrays["h.3.mlp.c_proj.weight"].std() == pytest.approx(INITIAL_STD / 4, rel=0.05)
    assert (arrays["h.0.ln_1.weight"] == 1.0).all()
    assert (arrays["h.0.attn.c_attn.bias"] == 0.0).all()
    # an untrained network predicts every token alike
    inputs, targets = random_tokens(config, 2, 8)
    loss = batch_loss(OPERATIONS, config, parameters, inputs, targets) / targets.size
    assert loss == pytest.approx(np.log(300), abs=0.1)


def test_sinusoidal_positions_are_constant_and_those_of_the_paper() -> None:
    table = sinusoidal_positions(50, 8)
    scale = table[0, 1]  # cos(0)
    assert table[7, 2] == pytest.approx(scale * np.sin(7 / 10000 ** (2 / 8)))
    assert table[7, 3] == pytest.approx(scale * np.cos(7 / 10000 ** (2 / 8)))
    config = small_config(positions="sinusoidal")
    parameters = Parameters(expected_shapes(config), constant_positions=True)
    initialize(parameters, config, seed=0)
    inputs, targets = random_tokens(config, 2, 5)
    batch_loss(OPERATIONS, config, parameters, inputs, targets, scale=1.0)
    assert parameters.tensors["wpe.weight"].gradient.array is None
    np.testing.assert_allclose(
        parameters.arrays()["wpe.weight"], sinusoidal_positions(8, 12), atol=1e-7
    )


def test_decay_is_for_matrices_only() -> None:
    decayed = {name for name in expected_shapes(small_config()) if is_decayed(name)}
    assert decayed == {"wte.weight"} | {
        f"h.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    parameters = Parameters(expected_shapes(small_config()))
    for group in parameters.groups:
        marked = np.zeros_like(parameters.values)
        marked[group.range] = 1.0
        names = {name for name, view in parameters.views(marked).items() if view.any()}
        assert all(is_decayed(name) == group.is_decayed for name in names)
