"""Axis ranges, ticks and downsampling of a chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_POINTS_PER_BUCKET = 5
_MIN_LOG_RATIO = 50.0
_MIN_RANGE = 1e-100


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to [0, 1], linearly or by the logarithm."""

    low: float
    high: float
    is_log: bool = False

    def fraction(self, value: float) -> float:
        """Return the position of a value: 0 at `low`, 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int, min_step: float = 0.0) -> list[float]:
        """Return about `count` round values within the range, at least `min_step` apart."""
        if self.is_log:
            return _log_ticks(self.low, self.high, count)
        step = max(min_step, _nice_step((self.high - self.low) / count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def fit_scale(
    values: Sequence[float], *, from_zero: bool = False, may_be_log: bool = False
) -> Scale:
    """Return a scale that contains the values, with a margin around them.

    `from_zero` puts one end of the axis at zero. `may_be_log` chooses a logarithmic axis for
    positive values that span a factor of 50 or more. Values are at most 1e100.
    """
    low, high = min(values), max(values)
    if may_be_log and low > _MIN_RANGE and high / low >= _MIN_LOG_RATIO:
        margin = (high / low) ** 0.04
        return Scale(low / margin, high * margin, is_log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(abs(low), abs(high)) * 1e-9 + _MIN_RANGE:
        half = abs(low) * 0.05
        return Scale(low - half, high + half) if half > _MIN_RANGE else Scale(0.0, 1.0)
    margin = (high - low) * 0.05
    return Scale(
        low if from_zero and low == 0 else low - margin,
        high if from_zero and high == 0 else high + margin,
    )


def downsample(values: Sequence[float | None], limit: int) -> list[int]:
    """Return the indices of at most `limit` values that draw nearly the same line.

    The values are divided into buckets of equal length. Each keeps its first, last, lowest and
    highest value, and its first gap, so that no extreme value disappears (M4: Jugel et al., "M4: A
    Visualization-Oriented Time Series Data Aggregation", VLDB 2014).
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    buckets = max(1, limit // _POINTS_PER_BUCKET)
    kept: list[int] = []
    for bucket in range(buckets):
        indices = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        finite = [(value, index) for index in indices if (value := values[index]) is not None]
        chosen = {finite[0][1], finite[-1][1], min(finite)[1], max(finite)[1]} if finite else set()
        gap = next((index for index in indices if values[index] is None), None)
        kept += sorted(chosen if gap is None else chosen | {gap})
    return kept


def _nice_step(step: float) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((power * nice for nice in (1, 2, 2.5, 5) if step <= power * nice), power * 10)


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return powers of ten, with multiples between them if there is room for these."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count + 1:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]
