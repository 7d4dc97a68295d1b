"""Requests with arrival times: a Poisson process or bursts, and prompts with shared prefixes.

Every prompt is one of a number of long prefixes (system prompts, few-shot examples), of Zipf's
popularity, and a part of its own. The token ids are random: only their equality matters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Arrivals = Literal["poisson", "bursts"]


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What a trace is drawn from.

    Attributes:
        rate: mean arrivals per second.
        requests: number of requests.
        arrivals: "poisson", or "bursts": a Poisson process that is on for `burst_s`, at
            `burst_factor` times the mean rate, and off in between.
        prefixes: number of shared prefixes; their popularity falls as 1 / rank.
        prefix_tokens, own_tokens: tokens of a prefix, and mean tokens of the part of its own.
        output_tokens: mean tokens to generate. Own parts and outputs have a geometric
            distribution, cut at four times the mean.
        vocab: token ids are below this.
    """

    rate: float
    requests: int
    arrivals: Arrivals = "poisson"
    burst_s: float = 2.0
    burst_factor: float = 4.0
    prefixes: int = 32
    prefix_tokens: int = 192
    own_tokens: int = 32
    output_tokens: int = 32
    vocab: int = 2048
    seed: int = 0

    def at_rate(self, rate: float, requests: int) -> "TraceSettings":
        """Return the same settings with another rate and number of requests."""
        return replace(self, rate=rate, requests=requests)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace; `time_s` counts from its start."""

    time_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def draw(settings: TraceSettings) -> Iterator[Arrival]:
    """Yield the requests in order; the same settings give the same trace."""
    generator = np.random.default_rng(settings.seed)
    prefixes = generator.integers(
        0, settings.vocab, (settings.prefixes, settings.prefix_tokens)
    ).tolist()
    popularity = 1.0 / np.arange(1, settings.prefixes + 1)
    popularity /= popularity.sum()
    for time_s in _times(settings, generator):
        prefix = prefixes[generator.choice(settings.prefixes, p=popularity)]
        own = generator.integers(0, settings.vocab, _length(generator, settings.own_tokens))
        yield Arrival(time_s, (*prefix, *own.tolist()), _length(generator, settings.output_tokens))


def _times(settings: TraceSettings, generator: np.random.Generator) -> Iterator[float]:
    """Yield arrival times.

    Bursts are a Poisson process in a time that stands still between them: a moment t of that time
    is at t + (burst_factor - 1) * burst_s * (number of bursts that have ended).
    """
    is_bursty = settings.arrivals == "bursts"
    rate = settings.rate * (settings.burst_factor if is_bursty else 1.0)
    pause_s = (settings.burst_factor - 1) * settings.burst_s if is_bursty else 0.0
    time_s = 0.0
    for _ in range(settings.requests):
        time_s += generator.exponential(1 / rate)
        yield time_s + pause_s * (time_s // settings.burst_s)


def _length(generator: np.random.Generator, mean: int) -> int:
    return min(int(generator.geometric(1 / mean)), 4 * mean)
