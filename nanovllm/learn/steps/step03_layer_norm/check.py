"""What step 3 must do, and what goes wrong."""

from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case, Mistake
from nanovllm.model.layers import layer_norm
from nanovllm.model.weights import LayerNorm

_EPSILON = 1e-5


def _arrays(tokens: int, d_model: int, offset: float = 0.0) -> tuple[np.ndarray, LayerNorm]:
    """Return rows with a mean of about `offset`, and a gain and bias that differ by column."""
    random = np.random.default_rng(3)
    hidden = random.normal(size=(tokens, d_model)).astype(np.float32) * 2 + np.float32(offset)
    gain = random.normal(size=d_model).astype(np.float32) + 1
    return hidden, LayerNorm(gain, random.normal(size=d_model).astype(np.float32))


def _plain(module: ModuleType) -> object:
    ones, zeros = np.ones(3, dtype=np.float32), np.zeros(3, dtype=np.float32)
    return module.layer_norm(np.array([[1, 2, 6]], dtype=np.float32), ones, zeros, 0.0)


def _case(tokens: int, d_model: int, offset: float = 0.0, scale: float = 1.0) -> Case:
    """Return a case whose result must be that of the engine's own layer normalization."""
    hidden, norm = _arrays(tokens, d_model, offset)
    hidden *= np.float32(scale)
    name = f"{tokens} rows of {d_model} columns"
    if offset:
        name += f", all about {offset:g}"
    if scale != 1:
        name += ", nearly constant"

    def run(module: ModuleType) -> object:
        return module.layer_norm(hidden.copy(), norm.gain, norm.bias, _EPSILON)

    return Case(name, run, lambda: layer_norm(hidden, norm, _EPSILON))


def _keeps_input(module: ModuleType) -> object:
    hidden, norm = _arrays(2, 4)
    module.layer_norm(hidden, norm.gain, norm.bias, _EPSILON)
    return {"the input after the call": hidden}


CASES = (
    Case(
        "the row 1, 2, 6 on paper",
        _plain,
        lambda: np.array([[-0.9258201, -0.46291, 1.38873]], dtype=np.float32),
        "The mean is 3, the variance (4 + 1 + 9) / 3.",
    ),
    _case(5, 8),
    _case(3, 16, scale=1e-3),
    _case(3, 16, offset=1000.0),
    Case("the input is not changed", _keeps_input, lesson="Residuals use `hidden` afterwards."),
)

_MEAN = "centred = hidden - hidden.mean(axis=1, keepdims=True)"
_VARIANCE = "variance = np.square(centred).mean(axis=1, keepdims=True)"
_ROOT = "np.sqrt(variance + np.float32(epsilon))"
_RESULT = f"return gain * (centred / {_ROOT}) + bias"

MISTAKES = (
    Mistake(
        "whole array",
        "Mean and variance are those of the whole array. Take them of each row: axis=1, "
        "keepdims=True.",
        f"    {_MEAN}\n    {_VARIANCE}",
        "    centred = hidden - hidden.mean()\n    variance = np.square(centred).mean()",
    ),
    Mistake(
        "mean of the whole array",
        "The mean is that of the whole array. Take it of each row: axis=1, keepdims=True.",
        _MEAN,
        "centred = hidden - hidden.mean()",
    ),
    Mistake(
        "variance of the whole array",
        "The variance is that of the whole array. Take it of each row: axis=1, keepdims=True.",
        _VARIANCE,
        "variance = np.square(centred).mean()",
    ),
    Mistake(
        "no keepdims",
        "The mean of the rows has the shape [tokens], which NumPy takes for a number of each "
        "column. keepdims=True keeps [tokens, 1], a number of each row.",
        _MEAN,
        "centred = hidden - hidden.mean(axis=1)",
    ),
    Mistake(
        "rows in a list",
        "The rows are returned as a list. Return one array, such as np.stack(rows).",
        _RESULT,
        f"return list(gain * (centred / {_ROOT}) + bias)",
    ),
    Mistake(
        "wrong axis",
        "Mean and variance are taken over the tokens (axis 0). Each row, axis 1, is normalized "
        "alone: what a token becomes must not depend on the others.",
        f"    {_MEAN}\n    {_VARIANCE}",
        f"    {_MEAN}\n    {_VARIANCE}".replace("axis=1", "axis=0"),
    ),
    Mistake(
        "mean not subtracted",
        "The mean is not subtracted from the numerator: x / sqrt(variance) is not centred.",
        "gain * (centred /",
        "gain * (hidden /",
    ),
    Mistake(
        "unbiased variance",
        "The variance is divided by d_model - 1. Here it is the plain mean of the squares, "
        "divided by d_model.",
        _VARIANCE,
        "variance = np.square(centred).sum(axis=1, keepdims=True) / (hidden.shape[1] - 1)",
    ),
    Mistake(
        "sum of the squares",
        "The variance is the sum of the squares. It is their mean: divide by d_model.",
        _VARIANCE,
        "variance = np.square(centred).sum(axis=1, keepdims=True)",
    ),
    Mistake(
        "squares of the row itself",
        "The variance is the mean of x^2. Subtract the mean before the square.",
        _VARIANCE,
        "variance = np.square(hidden).mean(axis=1, keepdims=True)",
    ),
    Mistake(
        "no epsilon",
        "Epsilon is not added to the variance. A nearly constant row shows it.",
        _ROOT,
        "np.sqrt(variance)",
    ),
    Mistake(
        "epsilon outside the root",
        "Epsilon is added to the root. It belongs inside: sqrt(variance + epsilon).",
        _ROOT,
        "(np.sqrt(variance) + np.float32(epsilon))",
    ),
    Mistake(
        "no root",
        "The row is divided by the variance; divide by its square root.",
        _ROOT,
        "(variance + np.float32(epsilon))",
    ),
    Mistake("no gain", "The gain is not applied.", "return gain * (centred", "return (centred"),
    Mistake(
        "no bias", "The bias is not added.", "np.float32(epsilon))) + bias", "np.float32(epsilon)))"
    ),
    Mistake(
        "gain behind the bias",
        "The bias is added before the gain is applied. The order is gain * normalized + bias.",
        _RESULT,
        f"return gain * (centred / {_ROOT} + bias)",
    ),
    Mistake(
        "variance by two means",
        "mean(x^2) - mean^2 is the small difference of two large numbers where the mean is far "
        "from zero, and loses its digits in float32. Subtract the mean first.",
        _VARIANCE,
        "variance = np.square(hidden).mean(axis=1, keepdims=True) - np.square(\n"
        "        hidden.mean(axis=1, keepdims=True))",
    ),
    Mistake(
        "in place",
        "`hidden` itself is changed (by -= or by out=hidden). The residual connection adds it to "
        "the block's result later: compute a new array.",
        _MEAN,
        "hidden -= hidden.mean(axis=1, keepdims=True)\n    centred = hidden",
    ),
)
