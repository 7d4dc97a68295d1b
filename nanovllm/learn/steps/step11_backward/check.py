"""What step 11 must do.

The expected gradients are those of the project's own training code, or central differences in
float64 of the forward pass. The upstream gradients are random: a gradient of ones hides mistakes.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType, SimpleNamespace

import numpy as np

from nanovllm.learn.checking import Case
from nanovllm.learn.steps.step03_layer_norm.solution import layer_norm
from nanovllm.learn.steps.step04_attention.solution import attention
from nanovllm.learn.steps.step11_backward import mistakes, training_mistakes
from nanovllm.learn.steps.step11_backward.solution import named_arrays
from nanovllm.model.checkpoint import build_tree, expected_shapes
from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import ModelWeights
from nanovllm.training.network.model import batch_loss
from nanovllm.training.network.numpy_operations import NumpyOperations
from nanovllm.training.network.operations import AttentionShape
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.parameters import Parameters, initialize
from nanovllm.training.network.schedule import Schedule

MISTAKES = mistakes.MISTAKES + training_mistakes.MISTAKES

_TEXT = (
    b"The frog sat on a log in the bog. The dog sat on the frog. The frog was in the bog, and "
    b"the dog was on the log. The frog and the dog sat in the fog on the bog by the log. "
)
_OPERATIONS = NumpyOperations()
_EPSILON = 1e-5
_CONTEXT, _STEPS, _SEQUENCES = 16, 12, 3
_PEAK, _FLOOR, _WARMUP, _MAX_NORM, _DECAY = 0.02, 0.002, 3, 1.2, 0.1


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _differences(
    function: Callable[[], np.ndarray], array: np.ndarray, grad: np.ndarray
) -> np.ndarray:
    """Return the central differences of sum(function() * grad) by each element of `array`."""
    result = np.empty_like(array)
    for place in np.ndindex(array.shape):
        value = array[place]
        array[place] = value + 1e-5
        above = (function() * grad).sum()
        array[place] = value - 1e-5
        result[place] = (above - (function() * grad).sum()) / 2e-5
        array[place] = value
    return result


def _linear_on_paper(module: ModuleType) -> object:
    grad, rows = np.array([[1, 2], [3, -1]], dtype="f4"), np.array([[5, 1, 0], [2, 0, 1]], "f4")
    weight = np.array([[1, 0], [2, 1], [0, 3]], dtype="f4")
    return _named(module.linear_backward(grad, rows, weight), "rows", "weight", "bias")


def _named(grads: object, *names: str) -> object:
    """Return gradients by name where there are as many; else what was returned."""
    if isinstance(grads, tuple) and len(grads) == len(names):
        return {f"the gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return dict.fromkeys((f"the gradient of {name}" for name in names), grads)


def _linear(module: ModuleType) -> object:
    grads = module.linear_backward(_random(5, 4), _random(5, 3), _random(3, 4))
    return _named(grads, "rows", "weight", "bias")


@cache
def _engine_linear() -> object:
    weight, bias = np.zeros((3, 4), dtype=np.float32), np.zeros(4, dtype=np.float32)
    rows = _OPERATIONS.linear_backward(
        _random(5, 4), _random(5, 3), _random(3, 4), None, weight, bias
    )
    return {
        "the gradient of rows": rows,
        "the gradient of weight": weight,
        "the gradient of bias": bias,
    }


_TARGETS = np.array([3, 0, 5, 2])


def _cross_entropy(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and the engine's gradient of their mean loss."""
    logits = _random(4, 6) * np.float32(scale)
    head = np.eye(6, dtype=np.float32)
    _, grad = _OPERATIONS.cross_entropy(logits, head, _TARGETS, 1 / 4, np.zeros_like(head))
    assert grad is not None
    return logits, grad


def _norm_arrays(tokens: int = 4, d_model: int = 6) -> tuple[np.ndarray, ...]:
    """Return an upstream gradient, rows, and a gain, in float64."""
    random = np.random.default_rng(11)
    grad, hidden = random.normal(size=(2, tokens, d_model))
    return grad, hidden * 2 + 1, random.normal(size=d_model) + 1


def _norm_sums(module: ModuleType) -> object:
    grad, hidden, gain = _norm_arrays()
    found = module.layer_norm_backward(grad, hidden, gain, 0.0)[0]
    return {
        "sum of each row of the gradient": found.sum(axis=1),
        "dot product of each row and its gradient": (found * hidden).sum(axis=1),
    }


def _norm(module: ModuleType) -> object:
    grads = module.layer_norm_backward(*_norm_arrays(), 0.5)  # large, so that it matters
    return _named(grads, "hidden", "gain", "bias")


@cache
def _norm_differences() -> object:
    grad, hidden, gain = _norm_arrays()
    bias = np.zeros_like(gain)

    def function() -> np.ndarray:
        return layer_norm(hidden, gain, bias, 0.5)

    arrays = {
        "the gradient of hidden": hidden,
        "the gradient of gain": gain,
        "the gradient of bias": bias,
    }
    return {name: _differences(function, array, grad) for name, array in arrays.items()}


_HEADS, _TOKENS, _HEAD_DIM = 2, 5, 3
_GRAD, _QUERIES, _KEYS, _VALUES = _random(4 * _HEADS, _TOKENS, _HEAD_DIM).reshape(4, _HEADS, 5, 3)


def _attention_inputs() -> list[np.ndarray]:
    """Return queries, keys and values that the reader's code may change."""
    return [array.copy() for array in (_QUERIES, _KEYS, _VALUES)]


def _attention(module: ModuleType) -> object:
    grads = module.attention_backward(_GRAD.copy(), *_attention_inputs())
    return _named(grads, "queries", "keys", "values")


@cache
def _engine_attention() -> object:
    """Return what the engine's training gives, whose arrays are [tokens, 3 * heads * head_dim]."""

    def merged(array: np.ndarray) -> np.ndarray:
        return array.transpose(1, 0, 2).reshape(_TOKENS, _HEADS * _HEAD_DIM)

    qkv = np.concatenate([merged(array) for array in (_QUERIES, _KEYS, _VALUES)], axis=1)
    shape = AttentionShape(1, _TOKENS, _HEADS, _HEAD_DIM**-0.5)
    out, logsumexp = _OPERATIONS.attention(qkv, shape)
    grads = _OPERATIONS.attention_backward(merged(_GRAD), qkv, out, logsumexp, shape)
    parts = (part.reshape(_TOKENS, _HEADS, _HEAD_DIM) for part in np.split(grads, 3, axis=1))
    return _named(tuple(part.transpose(1, 0, 2) for part in parts), "queries", "keys", "values")


def _first_token(module: ModuleType) -> object:
    """The first token sees itself alone, so its output changes with its value only."""
    grad = np.zeros_like(_GRAD)
    grad[:, 0] = _GRAD[:, 0]
    grads = module.attention_backward(grad, *_attention_inputs())
    return _named(grads, "queries", "keys", "values")


@cache
def _first_token_differences() -> object:
    grad = np.zeros(_GRAD.shape)
    grad[:, 0] = _GRAD[:, 0]
    arrays = [array.astype(np.float64) for array in (_QUERIES, _KEYS, _VALUES)]
    found = tuple(_differences(lambda: attention(*arrays), array, grad) for array in arrays)
    return _named(found, "queries", "keys", "values")


def _clip(max_norm: float) -> Callable[[ModuleType], object]:
    def run(module: ModuleType) -> object:
        gradients = {"a": np.array([[3, 0], [0, -4]], dtype="f4"), "b": np.array([12], dtype="f4")}
        norm = module.clip_gradients(gradients, max_norm)
        return {"the norm": norm, **{f"gradient {name}": a for name, a in gradients.items()}}

    return run


def _rates(module: ModuleType) -> object:
    return [module.learning_rate(step, _PEAK, _FLOOR, 4, 20) for step in (*range(20), 20, 30)]


_SHAPES = {
    "1.up.weight": (3, 4),
    "position_embedding": (4, 3),
    "1.up.bias": (4,),
    "token_embedding": (5, 3),
}
_BETA2 = 0.999  # with 0.99 the two corrections of the first update cancel
_ENGINE_NAMES = ("h.1.mlp.c_fc.weight", "wpe.weight", "h.1.mlp.c_fc.bias", "wte.weight")


def _adamw(updates: int, decay: float) -> Callable[[ModuleType], object]:
    def run(module: ModuleType) -> object:
        parameters = {name: _random(*shape) for name, shape in _SHAPES.items()}
        optimizer = module.AdamW(dict(parameters), weight_decay=decay, beta2=_BETA2)
        for update in range(updates):
            gradients = {name: _random(*shape) * (update + 1) for name, shape in _SHAPES.items()}
            optimizer.update(gradients, 0.1)
        return {f"{name} after update {updates}": array for name, array in parameters.items()}

    return run


def _engine_adamw(updates: int, decay: float) -> Callable[[], object]:
    def run() -> object:
        names = dict(zip(_ENGINE_NAMES, _SHAPES, strict=True))
        parameters = Parameters({name: _SHAPES[own] for name, own in names.items()})
        for name, own in names.items():
            parameters.tensors[name].data[...] = _random(*_SHAPES[own])
        optimizer = AdamW(parameters, _OPERATIONS, weight_decay=decay, grad_clip=0.0, beta2=_BETA2)
        for update in range(updates):
            for name, array in parameters.views(parameters.gradients).items():
                array[...] = _random(*_SHAPES[names[name]]) * (update + 1)
            optimizer.update(0.1)
        arrays = parameters.arrays()
        return {f"{own} after update {updates}": arrays[name] for name, own in names.items()}

    return run


def _model(steps: int, sequences: int) -> SimpleNamespace:
    """Return a tiny model with its initial weights, the text as tokens, and first tokens."""
    letters = sorted(set(_TEXT))
    tokens = np.array([letters.index(letter) for letter in _TEXT])
    config = ModelConfig(
        vocab=len(letters), max_positions=_CONTEXT, d_model=24, layers=2, heads=2, d_ff=96
    )
    parameters = Parameters(expected_shapes(config))
    initialize(parameters, config, seed=1)
    random = np.random.default_rng(0)
    starts = random.integers(0, len(tokens) - _CONTEXT, size=(steps, sequences))
    return SimpleNamespace(config=config, parameters=parameters, tokens=tokens, starts=starts)


def _tree(model: SimpleNamespace) -> ModelWeights:
    return build_tree(model.parameters.arrays(), model.config)


def _train(module: ModuleType, steps: int = _STEPS, sequences: int = _SEQUENCES) -> object:
    model = _model(steps, sequences)
    weights, heads = _tree(model), model.config.heads
    optimizer = module.AdamW(named_arrays(weights), weight_decay=_DECAY)

    def rate(step: int) -> float:
        return float(module.learning_rate(step, _PEAK, _FLOOR, _WARMUP, _STEPS))

    losses = module.train(
        weights, heads, _EPSILON, model.tokens, model.starts, _CONTEXT, optimizer, rate, _MAX_NORM
    )
    return {"the losses": np.array(losses, dtype=np.float64)}


@cache
def _engine_train(steps: int = _STEPS, sequences: int = _SEQUENCES) -> object:
    model = _model(steps, sequences)
    optimizer = AdamW(model.parameters, _OPERATIONS, weight_decay=_DECAY, grad_clip=_MAX_NORM)
    schedule = Schedule(_PEAK, _FLOOR, _WARMUP, _STEPS)
    losses, count = [], sequences * _CONTEXT
    for step in range(steps):
        places = model.starts[step][:, None] + np.arange(_CONTEXT)
        inputs, targets = model.tokens[places], model.tokens[places + 1]
        total = batch_loss(
            _OPERATIONS, model.config, model.parameters, inputs, targets, scale=1 / count
        )
        losses.append(total / count)
        optimizer.update(schedule.learning_rate(step))
    return {"the losses": np.array(losses)}


CASES = (
    Case(
        "linear: two rows on paper",
        _linear_on_paper,
        lambda: {
            "the gradient of rows": np.array([[1, 4, 6], [3, 5, -3]], dtype="f4"),
            "the gradient of weight": np.array([[11, 8], [1, 2], [3, -1]], dtype="f4"),
            "the gradient of bias": np.array([4, 1], dtype="f4"),
        },
        "Each gradient has the shape of its array; a matmul that gives this shape is a good guess.",
    ),
    Case("linear: five rows", _linear, _engine_linear),
    Case(
        "cross-entropy: two rows on paper",
        lambda module: module.cross_entropy_backward(
            np.array([[0, 0, 0, 0], [0, np.log(3), 0, 0]], dtype="f4"), np.array([2, 1])
        ),
        lambda: np.array([[3, 3, -9, 3], [2, -6, 2, 2]], dtype="f4") / 24,
        "Row 0 has P = 1/4 everywhere, row 1 has 1/6, 1/2, 1/6, 1/6.",
    ),
    Case(
        "cross-entropy: four rows",
        lambda module: module.cross_entropy_backward(_cross_entropy(1.0)[0], _TARGETS),
        lambda: _cross_entropy(1.0)[1],
    ),
    Case(
        "cross-entropy: large logits do not overflow",
        lambda module: module.cross_entropy_backward(_cross_entropy(200.0)[0], _TARGETS),
        lambda: _cross_entropy(200.0)[1],
    ),
    Case(
        "layer norm: what must be zero",
        _norm_sums,
        lambda: dict.fromkeys(
            (
                "sum of each row of the gradient",
                "dot product of each row and its gradient",
            ),
            np.zeros(4),
        ),
        "A constant that is added to a row, or a factor of it, changes nothing behind the norm.",
    ),
    Case("layer norm: central differences", _norm, _norm_differences),
    Case("attention: the first token sees itself", _first_token, _first_token_differences),
    Case("attention: two heads of five tokens", _attention, _engine_attention),
    Case("clipping: norm 13, limit 20", _clip(20.0), lesson="Below the limit nothing changes."),
    Case("clipping: norm 13, limit 2.6", _clip(2.6), lesson="Everything is divided by 5."),
    Case(
        "learning rates of 20 steps, and of later ones",
        _rates,
        lambda: [
            Schedule(_PEAK, _FLOOR, 4, 20).learning_rate(step) for step in (*range(20), 20, 30)
        ],
    ),
    Case("AdamW: one update without decay", _adamw(1, 0.0), _engine_adamw(1, 0.0)),
    Case("AdamW: three updates without decay", _adamw(3, 0.0), _engine_adamw(3, 0.0)),
    Case("AdamW: three updates with decay", _adamw(3, 0.5), _engine_adamw(3, 0.5)),
    Case(
        "training: the losses of two steps, of one sequence each",
        lambda module: _train(module, 2, 1),
        lambda: _engine_train(2, 1),
    ),
    Case(
        "training: the losses of twelve steps, of three sequences each",
        _train,
        _engine_train,
        "Expected are the losses of the project's own training with the same batches.",
    ),
)
