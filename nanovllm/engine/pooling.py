"""Pool the final hidden states of a prompt into one vector: the last token's, or the mean of all.

In a decoder, the last token attends to the whole text. The mean weighs all tokens equally.
Muennighoff (2022, arXiv:2202.08904) compares the two for GPT models. Rows are added one by one in
float64 and in token order, so the result does not depend on the chunks of the prefill.
"""

import math

import numpy as np
import numpy.typing as npt


class Pooler:
    """Averages hidden states as steps compute them; with pooling "last" there is only one."""

    def __init__(self, *, normalize: bool) -> None:
        """Start without rows; `normalize` scales the vector to length 1."""
        self._normalize = normalize
        self._total: npt.NDArray[np.float64] | None = None
        self._count = 0

    def add(self, hidden: npt.NDArray[np.float32]) -> None:
        """Add hidden states [tokens, d_model], in token order."""
        for row in hidden:
            self._total = row.astype(np.float64) if self._total is None else self._total + row
            self._count += 1

    def embedding(self) -> list[float] | None:
        """Return the vector [d_model], rounded to float32; None if a hidden state is not finite."""
        assert self._total is not None, "a request finishes after its rows"
        if not np.isfinite(self._total).all():
            return None
        mean = self._total / self._count
        length = math.sqrt(math.fsum((mean * mean).tolist())) if self._normalize else 1.0
        vector: list[float] = (mean / (length or 1.0)).astype(np.float32).tolist()
        return vector
