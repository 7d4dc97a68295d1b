"""CostModel: the time of an engine step, linear in its tokens, fitted to measured steps. FrontCost:
that of Ray Serve's proxies and the ingress before it.

    seconds = step + prompt * prompt tokens + decode * decoding sequences
              + context * positions attended

Each coefficient has a meaning: the fixed cost of a step (the weights are read once), the arithmetic
of a token, and the keys and values that attention reads. Non-negative least squares on relative
errors, so that short steps count as much as long ones.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

MAX_MEDIAN_ERROR = 0.2
"""Largest median of the relative errors of a fit that is used."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """The size of a step: tokens of prompts, decoding sequences, and positions attended to."""

    prompt_tokens: int
    decodes: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured coefficients, in a file of JSON."""

    def save(self, path: Path) -> None:
        """Write the coefficients."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` has written."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class CostModel(Costs):
    """Seconds of each part of a step, and of a request beside the engine's steps (`request`)."""

    step: float
    prompt: float
    decode: float
    context: float
    request: float = 0.0

    def seconds(self, size: StepSize) -> float:
        """Return the time of a step."""
        return (
            self.step
            + self.prompt * size.prompt_tokens
            + self.decode * size.decodes
            + self.context * size.context_tokens
        )


@dataclass(frozen=True, slots=True)
class FrontCost(Costs):
    """CPU seconds of the proxy and the ingress for each request, and for each streamed token.

    Each is a Python process, which does one thing after the other. A request takes time of its
    proxy and of its ingress, and so does each token of its stream on the way back; tokens of one
    step are sent together.
    """

    proxy_request: float = 0.0
    proxy_token: float = 0.0
    ingress_request: float = 0.0
    ingress_token: float = 0.0

    def ingress_capacity(self, output_tokens: float) -> float:
        """Return the streams per second of one ingress that is always busy."""
        return 1 / (self.ingress_request + output_tokens * self.ingress_token)


def fit(sizes: Sequence[StepSize], seconds: Sequence[float]) -> CostModel:
    """Return the model with the least relative errors; raises ValueError for too few steps."""
    if len(sizes) < 8 or len(sizes) != len(seconds):
        raise ValueError(
            f"{len(sizes)} steps and {len(seconds)} times cannot be fitted; measure 8 steps or more"
        )
    times = np.asarray(seconds, np.float64)
    rows = np.array(
        [[1, size.prompt_tokens, size.decodes, size.context_tokens] for size in sizes], np.float64
    )
    return CostModel(*_nonnegative(rows / times[:, None]).tolist())


def check_fit(errors: npt.NDArray[np.float64]) -> None:
    """Raise ValueError if the median relative error is above MAX_MEDIAN_ERROR."""
    median = float(np.median(np.abs(errors)))
    if median > MAX_MEDIAN_ERROR:
        raise ValueError(
            f"the cost model misses the measured steps by {median:.0%} in the median, more than "
            f"{MAX_MEDIAN_ERROR:.0%}: its predictions would mean nothing; measure on an idle "
            "machine, or take the coefficients of an earlier run by --cost"
        )


def relative_errors(
    model: CostModel, sizes: Sequence[StepSize], seconds: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Return predicted / measured - 1 of each step."""
    predicted = np.array([model.seconds(size) for size in sizes])
    return predicted / np.asarray(seconds, np.float64) - 1


def _nonnegative(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return x >= 0 with the least |rows @ x - 1|: drop the most negative until none is left."""
    active = list(range(rows.shape[1]))
    while True:
        part, *_ = np.linalg.lstsq(rows[:, active], np.ones(len(rows)), rcond=None)
        if part.min() >= 0:
            solution = np.zeros(rows.shape[1])
            solution[active] = part
            return solution
        del active[int(part.argmin())]
