"""The learning rate of each update."""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "constant", "wsd")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warmup to `peak`; what follows is one of SCHEDULES.

    - cosine: half a cosine from `peak` to `floor` over all other updates (Loshchilov and Hutter
      2017, arXiv:1608.03983).
    - constant: `peak`.
    - wsd: warmup, stable, decay (Hu et al. 2024, MiniCPM, arXiv:2404.06395): `peak`, then linearly
      to `floor` over the last `decay_steps` updates.

    Attributes:
        peak, floor: learning rates.
        warmup_steps: updates below the peak at the start.
        steps: updates of the whole run; later updates keep the last rate.
        decay_steps: of wsd.
    """

    peak: float
    floor: float
    warmup_steps: int
    steps: int
    kind: str = "cosine"
    decay_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "cosine":
            return self._cosine(step)
        decayed = step - (self.steps - self.decay_steps)
        if self.kind == "constant" or decayed <= 0:
            return self.peak
        return self.peak - (self.peak - self.floor) * min(1.0, decayed / self.decay_steps)

    def first_difference(self, other: "Schedule", steps: int) -> int | None:
        """Return the first of so many updates to which `other` gives another rate, or None."""
        if self == other:
            return None
        differ = (
            one for one in range(steps) if self.learning_rate(one) != other.learning_rate(one)
        )
        return next(differ, None)

    def _cosine(self, step: int) -> float:
        if step >= self.steps:
            return self.floor
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (self.peak - self.floor)
