"""Drafts: what speculative decoding has drafted, by the names of vLLM's `bench serve`.

The counters are those of an engine, or of a server's /metrics, which may be vLLM's.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cli.bench.report import shown
from nanovllm.engine.metrics import EngineSnapshot

_SERIES = re.compile(
    r"^\w+:spec_decode_num_(drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos)_total"
    r"(?:\{(?:[^}]*,)?(?:position=\"(\d+)\")?[^}]*\})? (\S+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Drafts:
    """Counters of drafts, their tokens, and the accepted tokens, also by index in the draft."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of_engine(cls, stats: EngineSnapshot) -> "Drafts":
        """Return the counters of an engine."""
        by_position = Counter(dict(enumerate(stats.num_accepted_tokens_per_pos)))
        return cls(stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, by_position)

    @classmethod
    def of_metrics(cls, text: str) -> "Drafts":
        """Return the counters in the text of /metrics, where it has any."""
        totals: Counter[str] = Counter()
        by_position: Counter[int] = Counter()
        for name, position, value in _SERIES.findall(text):
            if position:
                by_position[int(position)] += round(float(value))
            else:
                totals[name] += round(float(value))
        return cls(totals["drafts"], totals["draft_tokens"], totals["accepted_tokens"], by_position)

    def since(self, before: "Drafts") -> "Drafts":
        """Return what has been counted since `before`."""
        by_position = Counter(self.by_position)
        by_position.subtract(before.by_position)
        return Drafts(
            self.drafts - before.drafts,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            by_position,
        )

    @property
    def percent_by_position(self) -> list[float]:
        """Return how many of all drafts were accepted up to each position, in percent."""
        return [
            100 * self.by_position[position] / self.drafts for position in sorted(self.by_position)
        ]

    def figures(self) -> dict[str, Any]:
        """Return the figures in JSON, with rates in percent; none without drafts."""
        if not self.drafts:
            return {}
        return {
            "spec_decode_num_drafts": self.drafts,
            "spec_decode_draft_tokens": self.drafted,
            "spec_decode_accepted_tokens": self.accepted,
            "spec_decode_acceptance_rate": 100 * self.accepted / self.drafted,
            "spec_decode_acceptance_length": 1 + self.accepted / self.drafts,
            "spec_decode_per_position_acceptance_rates": self.percent_by_position,
        }

    def shown(self) -> dict[str, str]:
        """Return the figures as lines of the report; none without drafts."""
        if not self.drafts:
            return {}
        return {
            "drafted": f"{self.drafted:,} tok",
            "accepted": f"{self.accepted:,} tok",
            "accepted, of drafted": shown(100 * self.accepted / self.drafted, "%", 1),
            "tokens per verification": shown(1 + self.accepted / self.drafts),
            "accepted by position": ", ".join(f"{rate:.0f}" for rate in self.percent_by_position)
            + " %",
        }
