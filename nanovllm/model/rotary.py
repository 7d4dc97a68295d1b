"""Rotary positions (Su et al. 2021, arXiv:2104.09864): a position turns queries and keys.

A head has pairs of numbers, the i-th of its first half and the i-th of its second half. The pair i
of the token at position p is turned by the angle p * frequency[i], where

    frequency[i] = theta ** (-2 i / head_dim)

so the score of a query and a key depends on the distance of their positions alone. Models that were
trained on short texts and then on longer ones scale the frequencies (SCALINGS).
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

SCALINGS = ("default", "linear", "llama3")
"""How frequencies are scaled:

default  not at all
linear   divided by the factor: positions are closer together (Chen et al. 2023, arXiv:2306.15595)
llama3   only low ones, which turn less than once in the context of the first training, are divided;
         those that turn `high_turns` times stay, and between the two the divisor falls smoothly
         (Grattafiori et al. 2024, arXiv:2407.21783)
"""


@dataclass(frozen=True, slots=True)
class Rotary:
    """The angles of rotary positions.

    Attributes:
        theta: base of the frequencies.
        scaling: one of SCALINGS.
        factor: how many times longer the context is than that of the first training.
        low_turns, high_turns: of "llama3": turns in the first context below which a frequency is
            divided by the factor, and above which it stays.
        first_context: tokens of the first training's context, of "llama3".
    """

    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_turns: float = 1.0
    high_turns: float = 4.0
    first_context: float = 8192

    def frequencies(self, head_dim: int) -> Float32[np.ndarray, " pairs"]:
        """Return the angle between two positions of each pair of a head's numbers, in radians."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = 1.0 / np.float32(self.theta) ** exponents
        if self.scaling == "linear":
            return frequencies / np.float32(self.factor)
        if self.scaling == "llama3":
            turns = self.first_context * frequencies / np.float32(2 * math.pi)
            kept = (turns - self.low_turns) / (self.high_turns - self.low_turns)
            kept = np.clip(kept, 0.0, 1.0).astype(np.float32)
            return (1 - kept) * frequencies / np.float32(self.factor) + kept * frequencies
        return frequencies

    def angles(
        self, positions: Int64[np.ndarray, " tokens"], head_dim: int
    ) -> Float32[np.ndarray, "tokens pairs"]:
        """Return the angles of the tokens at these positions, in radians."""
        return positions.astype(np.float32)[:, None] * self.frequencies(head_dim)


def turn(
    heads: Float32[np.ndarray, "tokens heads head_dim"], angles: Float32[np.ndarray, "tokens pairs"]
) -> Float32[np.ndarray, "tokens heads head_dim"]:
    """Return queries or keys with every pair turned by its token's angle."""
    first, second = np.split(heads, 2, axis=2)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # the same for all heads
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)
