"""All parameters of a network as named views of one flat array.

Gradients and the optimizer's moments have flat arrays of the same layout, so one pass over memory
updates everything. Parameters with weight decay come first, then those without:

    | wte.weight | h.0.attn.c_attn.weight | ... || wpe.weight | ln_f.weight | h.0.ln_1.bias | ... |
      decayed: matrices                            not decayed: gains, biases, positions

Each parameter begins at a cache line. The padding between two is 0 and stays 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, round_up
from nanovllm.training.network.autograd import Tensor

_POSITIONS = "wpe.weight"
INITIAL_STD = 0.02
"""Standard deviation of the initial weights in GPT-2."""
Flat = Float[np.ndarray, " size"]


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies: to matrices, but not to the position embedding."""
    is_matrix = name.endswith(".weight") and ".ln_" not in name and not name.startswith("ln_f")
    return is_matrix and name != _POSITIONS


@dataclass(frozen=True, slots=True)
class Group:
    """A range of the flat arrays whose parameters are updated alike."""

    range: slice
    is_decayed: bool


class Parameters:
    """A network's parameters and their gradients. Arrays are changed in place and never replaced.

    Attributes:
        values, gradients: flat arrays.
        tensors: the parameters by name, views of `values` and `gradients`. A constant position
            embedding, which no optimizer updates, has no gradient and an array of its own.
        groups: the ranges of the flat arrays with and without weight decay.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        constant_positions: bool = False,
        dtype: type[np.floating] = np.float32,
    ) -> None:
        """Lay out parameters of zeros; the position embedding alone may be constant.

        `shapes` is `checkpoint.expected_shapes` of a network.
        """
        trained = [name for name in shapes if not (constant_positions and name == _POSITIONS)]
        ordered = sorted(trained, key=lambda name: not is_decayed(name))
        self._starts: dict[str, int] = {}
        self._shapes = dict(shapes)
        stop, decayed_stop = 0, 0
        for name in ordered:
            self._starts[name] = stop
            stop += round_up(math.prod(shapes[name]), LINE_BYTES // 4)
            decayed_stop = stop if is_decayed(name) else decayed_stop
        self.values, self.gradients = _zeros(stop, dtype), _zeros(stop, dtype)
        decayed, others = slice(0, decayed_stop), slice(decayed_stop, stop)
        self.groups = (Group(decayed, is_decayed=True), Group(others, is_decayed=False))
        values, gradients = self.views(self.values), self.views(self.gradients)
        self.tensors = {
            name: Tensor(values[name], gradients[name])
            if name in values
            else Tensor(np.zeros(shapes[name], dtype=dtype))
            for name in shapes
        }

    def views(self, flat: Flat) -> dict[str, np.ndarray]:
        """Return views of a flat array of this layout, by parameter name."""
        return {
            name: flat[start : start + math.prod(self._shapes[name])].reshape(self._shapes[name])
            for name, start in self._starts.items()
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all parameters by name, the constant ones too."""
        return {name: tensor.data for name, tensor in self.tensors.items()}


def initialize(parameters: Parameters, config: ModelConfig, seed: int) -> None:
    """Draw the initial weights as GPT-2 does.

    Matrices are normal with standard deviation 0.02. The output projections of attention and
    feed-forward, which add to the residual stream, are scaled by 1 / sqrt(2 * layers), so that the
    stream's variance does not grow with depth (Radford et al. 2019, section 2.3). Gains are 1,
    biases 0. All parameters of an absent part are 0, and stay so.
    """
    generator = np.random.default_rng(seed)
    removed = {"positions": _POSITIONS, "ffn": ".mlp."}
    absent = [part for name, part in removed.items() if name in config.ablated]
    for name, tensor in parameters.tensors.items():
        if any(part in name for part in absent):
            tensor.data[...] = 0.0
        elif name == _POSITIONS and config.positions == "sinusoidal":
            tensor.data[...] = sinusoidal_positions(config.max_positions, config.d_model)
        elif tensor.data.ndim == 2:
            std = INITIAL_STD
            if name.endswith("c_proj.weight"):
                std /= math.sqrt(2 * config.layers)
            tensor.data[...] = std * generator.standard_normal(tensor.data.shape)
        else:
            tensor.data[...] = 1.0 if name.endswith(".weight") else 0.0


def sinusoidal_positions(count: int, width: int) -> Float[np.ndarray, "count width"]:
    """Return the sine and cosine of each position at geometrically spaced wavelengths.

    The formula is of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5: even columns hold sines,
    odd columns cosines, with wavelengths from 2 pi to 10000 * 2 pi. The amplitude is chosen so that
    the standard deviation is that of learned positions at the start, where Vaswani et al. scale up
    the token embedding instead.
    """
    columns = np.arange(width)
    angles = np.arange(count)[:, None] / 10000.0 ** (columns // 2 * 2 / width)
    return INITIAL_STD * math.sqrt(2.0) * np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))


def _zeros(count: int, dtype: type[np.floating]) -> np.ndarray:
    if dtype is np.float32:
        return aligned_zeros(count)
    return np.zeros(count, dtype=dtype)
