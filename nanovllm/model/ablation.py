"""Ablation: a network with some of its parts switched off, to see what each contributes.

The heads of a layer share the output projection W_O: they add the sum over heads of
head_output @ W_O[rows of the head] to the residual stream. So a head is switched off by zeros in
its rows, as in Michel et al. 2019 (arXiv:1905.10650), and a sublayer, attention or feed-forward, by
zeros in its last projection and its bias: it then adds nothing. The forward pass stays as it is.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import Layer, Linear, ModelWeights

PartKind: TypeAlias = Literal["head", "attention", "ffn", "block"]
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a network that can be switched off.

    Attributes:
        layer: from 0.
        kind: one attention head, the attention sublayer, the feed-forward sublayer, or both.
        head: from 0; None for another kind.
    """

    layer: int
    kind: PartKind
    head: int | None = None


def parts_of(config: ModelConfig, kinds: Collection[PartKind] = PART_KINDS) -> list[Part]:
    """Return the parts of these kinds, layer by layer, in the order of PART_KINDS."""
    parts = []
    for layer in range(config.layers):
        parts += [Part(layer, "head", head) for head in range(config.heads)]
        parts += [Part(layer, kind) for kind in PART_KINDS[1:]]
    return [part for part in parts if part.kind in kinds]


def without(weights: ModelWeights, config: ModelConfig, parts: Collection[Part]) -> ModelWeights:
    """Return the network with these parts switched off; unchanged arrays are shared.

    Blocks that are read from a file at each access still are. A block without some of its parts is
    made at each access. Without parts to switch off, the result is `weights` itself.
    """
    if not parts:
        return weights
    return replace(weights, layers=_AblatedLayers(weights.layers, config, parts))


class _AblatedLayers(Sequence[Layer[Linear]]):
    """The blocks of a network without some parts, each made when it is accessed."""

    def __init__(
        self, layers: Sequence[Layer[Linear]], config: ModelConfig, parts: Collection[Part]
    ) -> None:
        self._layers, self._config, self._parts = layers, config, parts

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        parts = [part for part in self._parts if part.layer == index]
        return block_without(self._layers[index], self._config, parts)


def block_without(
    block: Layer[Linear], config: ModelConfig, parts: Iterable[Part]
) -> Layer[Linear]:
    """Return a block without some of its parts."""
    for part in parts:
        if part.head is not None:
            weight = block.out.weight.copy()
            weight[part.head * config.head_dim : (part.head + 1) * config.head_dim] = 0
            block = replace(block, out=Linear(weight, block.out.bias))
        if part.kind in ("attention", "block"):
            block = replace(block, out=_zeros_like(block.out))
        if part.kind in ("ffn", "block"):
            block = replace(block, down=_zeros_like(block.down))
    return block


def _zeros_like(linear: Linear) -> Linear:
    return Linear(np.zeros_like(linear.weight), np.zeros_like(linear.bias))
