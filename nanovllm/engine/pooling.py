"""From the final hidden states of a prompt's tokens to one vector: the last token's own, or the mean of all.

A decoder's last token has seen the whole text, so its state stands for it; the mean weighs every token alike (Muennighoff 2022,
arXiv:2202.08904, compares the two for GPT models). Rows are added one by one in float64, in the order of the tokens, so that the chunks
in which a prompt was read change no bit of the result.
"""

import math

import numpy as np
import numpy.typing as npt


class Pooler:
    """Takes in a prompt's rows as steps compute them; of one row the mean is the row itself."""

    def __init__(self, *, normalize: bool) -> None:
        """`normalize` scales the vector to length 1, so that the product of two is their cosine."""
        self._normalize = normalize
        self._total: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, hidden: npt.NDArray[np.float32]) -> None:
        """Add the next tokens' hidden states [tokens, d_model]."""
        for row in hidden:
            self._total = row.astype(np.float64) if self._total is None else self._total + row
            self._count += 1

    def embedding(self) -> list[float] | None:
        """The vector, each number a float32; None where the network's output is not a number."""
        assert self._total is not None, "a request is finished only when its rows have come"
        if not np.isfinite(self._total).all():
            return None
        mean = self._total / self._count
        length = math.sqrt(math.fsum((mean * mean).tolist())) if self._normalize else 1.0
        vector: list[float] = (mean / (length or 1.0)).astype(np.float32).tolist()
        return vector
