"""Summarize measurements: medians, ratios within rounds, fractions of the limits, and agreement.

The greedy outputs of two contenders must agree up to the first near tie of the top two tokens.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.contenders import OURS
from benchmarks.options import spread
from benchmarks.workload import Workload
from nanovllm.cli.bench.roofline import Costs

NEAR_TIE = 1e-3  # between log-probabilities: what float32 sums in another order may turn


@dataclass(frozen=True, slots=True)
class Agreement:
    """Number of requests with equal outputs, with a difference after a near tie, and without one.

    `equal_tokens` is the fraction of tokens before the first difference of their output.
    """

    requests: int
    equal: int
    near_tie: int
    different: int
    equal_tokens: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One run, and the mean memory bandwidth before and after it in bytes per second."""

    contender: str
    workload: str
    round: int
    tokens_per_s: float
    bandwidth: float


@dataclass(slots=True)
class ClassResults:
    """The measurements of a class; `problems` names missing or invalid contenders.

    `peak_type` is the type whose multiply-adds are the peak: that in which our kernels compute.
    """

    kind: str
    peak: float | None
    costs: Costs
    workloads: Mapping[str, Workload]
    samples: list[Sample] = field(default_factory=list)
    abouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    peak_type: str | None = None
    agreements: dict[str, dict[str, Agreement]] = field(default_factory=dict)

    def speeds(self, contender: str, workload: str) -> dict[int, float]:
        """Return tokens per second by round."""
        return {
            sample.round: sample.tokens_per_s for sample in self.samples_of(contender, workload)
        }

    def speed(self, contender: str, workload: str) -> float | None:
        """Return the median over the rounds."""
        speeds = self.speeds(contender, workload)
        return statistics.median(speeds.values()) if speeds else None

    def ratios(self, workload: str) -> dict[str, float]:
        """Return our speed divided by each peer's: the median over common rounds."""
        ours = self.speeds(OURS, workload)
        found = {}
        for peer in self.abouts:
            theirs = self.speeds(peer, workload)
            rounds = ours.keys() & theirs.keys()
            if peer != OURS and rounds:
                found[peer] = statistics.median(ours[number] / theirs[number] for number in rounds)
        return found

    def best_peer(self, workload: str) -> tuple[str, float] | None:
        """Return the fastest peer and our ratio to it; None without peers."""
        ratios = self.ratios(workload)
        return min(ratios.items(), key=lambda item: item[1]) if ratios else None

    def share(self, contender: str, workload: str) -> float | None:
        """Return the fraction of bandwidth (decode1) or peak (prefill512); None for others."""
        work = self.workloads[workload]
        prompt = len(work.prompts[0])
        if workload == "decode1":
            seen = sum(prompt + step for step in range(1, work.tokens + 1))
            step_bytes = self.costs.read_bytes(work.tokens, seen) / work.tokens
            shares = [
                sample.tokens_per_s * step_bytes / sample.bandwidth
                for sample in self.samples_of(contender, workload)
            ]
            return statistics.median(shares) if shares else None
        speed = self.speed(contender, workload)
        if workload != "prefill512" or speed is None or self.peak is None:
            return None
        operations = self.costs.operations(prompt, prompt * (prompt + 1) // 2, 1)
        return operations / prompt * speed / self.peak

    def samples_of(self, contender: str, workload: str) -> list[Sample]:
        """Return all runs of a contender on a workload."""
        return [
            sample
            for sample in self.samples
            if (sample.contender, sample.workload) == (contender, workload)
        ]

    def record(self) -> dict[str, Any]:
        """Return everything as JSON."""
        bandwidths = [sample.bandwidth for sample in self.samples]
        return {
            "bandwidth_bytes_per_s": spread(bandwidths) if bandwidths else None,
            "peak_operations_per_s": self.peak,
            "peak_type": self.peak_type,
            "contenders": {
                name: {
                    **about,
                    "workloads": {
                        workload: {
                            "tokens_per_s": spread(list(speeds.values())),
                            "share_of_limit": self.share(name, workload),
                        }
                        for workload in self.workloads
                        if (speeds := self.speeds(name, workload))
                    },
                    "agreement": {
                        workload: asdict(found)
                        for workload, found in self.agreements.get(name, {}).items()
                    },
                }
                for name, about in self.abouts.items()
            },
            "ratios": {workload: self.ratios(workload) for workload in self.workloads},
            "best_peer": {
                workload: best for workload in self.workloads if (best := self.best_peer(workload))
            },
            "problems": self.problems,
        }

    def notes(self) -> list[str]:
        """Return the problems, and how far the peers' outputs are ours, one a line."""
        lines = [f"{name}: {problem}" for name, problem in self.problems.items()]
        for name, by_workload in self.agreements.items():
            requests, equal, near_tie = (
                sum(getattr(one, what) for one in by_workload.values())
                for what in ("requests", "equal", "near_tie")
            )
            share = min(one.equal_tokens for one in by_workload.values())
            parting = f"{near_tie} differ after a near tie, {requests - equal - near_tie} elsewhere"
            lines.append(
                f"{name}: {equal} of {requests} outputs are ours, {parting}; "
                f"{share:.0%} of the tokens come before that"
            )
        return lines


def compare_outputs(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]]
) -> Agreement:
    """Compare outputs by token; `gaps` are our log-probability gaps of the top two tokens."""
    equal = near_tie = same_tokens = 0
    for mine, other, distances in zip(ours, theirs, gaps, strict=True):
        first = next(
            (
                index
                for index, pair in enumerate(zip(mine, other, strict=True))
                if pair[0] != pair[1]
            ),
            len(mine),
        )
        same_tokens += first
        if first == len(mine):
            equal += 1
        elif min(distances[: first + 1]) < NEAR_TIE:
            near_tie += 1
    tokens = sum(map(len, ours))
    return Agreement(
        len(ours),
        equal,
        near_tie,
        len(ours) - equal - near_tie,
        same_tokens / tokens if tokens else 1.0,
    )
