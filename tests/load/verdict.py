"""Judge a soak: conditions with their figures, and a table."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.load.attack import LOADED
from tests.load.attacks import ATTACKS
from tests.load.bystanders import LOST, OK, OTHER_BITS
from tests.load.ledger import ANSWERED, CUT, FAILED, LEFT, Ledger
from tests.load.watch import Sample, Watch

RSS_GROWTH = 0.05
ATTACKED_RSS_GROWTH = 0.25  # large requests leave gaps in the heap
_RSS_AFTER_S = 60.0
_RSS_WINDOW_S = 10.0
_MAX_NEW_FILES = 8  # opened once by the log and the interpreter


def judge(
    ledger: Ledger,
    watch: Watch,
    idle: Sample,
    files: tuple[int | None, int | None],
    refilled: bool,
    end: Mapping[str, Any],
    max_health_s: float,
    seen: "Seen | None" = None,
    must_draft: bool = False,
) -> dict[str, Any]:
    """Return the figures and `conditions`: (name, held, detail).

    Args:
        files: open files before and after the load.
        refilled: a request that fills the queue was accepted after the load.
        seen: results of bystanders and attackers, if any.
        must_draft: the server has a --speculative-config.
        end: the result of `ServerProcess.end`, and `last_streams`: (properly ended, all) streams
            of the moment of the signal.
    """
    memory = rss_figures(watch.samples, idle)
    max_growth = RSS_GROWTH if seen is None else ATTACKED_RSS_GROWTH
    health_ms = _milliseconds(watch.health_s)
    counts = _counts(watch.samples[0], idle)
    conditions = [
        ("every request was answered or refused", ledger.open + ledger.count(FAILED) == 0,
         f"{ledger.open} open, {ledger.count(FAILED)} failed"),
        ("there was more than the server could take", ledger.count("refused 429") > 0,
         f"{ledger.count('refused 429'):,} refused by 429"),
        ("greedy and seeded answers have the bits of those taken alone", ledger.checked > 0,
         f"{ledger.checked:,} compared"),
        ("nothing runs or waits at the end", idle.running == idle.waiting == idle.kv_usage == 0,
         f"running {idle.running:g}, waiting {idle.waiting:g}, KV use {idle.kv_usage:g}"),
        ("every place of the queue is free again", refilled,
         "filled by one request" if refilled else "refused"),
        ("memory is flat", memory["growth"] is None or memory["growth"] <= max_growth,
         memory["text"]),
        ("no connection is left behind", _are_few(files),
         f"{files[0]} open files before, {files[1]} after"),
        ("/health answers meanwhile", health_ms["max"] <= 1000 * max_health_s,
         "median {median} ms, p99 {p99} ms, max {max} ms".format(**health_ms)),
        ("streams that run at SIGTERM come to an end",
         end["last_streams"][0] == end["last_streams"][1], "{} of {}".format(*end["last_streams"])),
        ("the process ends with 0", end["exit_code"] == 0, f"exit code {end['exit_code']}"),
        ("check_integrity() is clean", end["integrity"] == "clean", end["integrity"]),
        ("the log has no traceback", end["tracebacks"] == 0, f"{end['tracebacks']}"),
        *(_draft_conditions(counts) if must_draft else ()),
        *(attack_conditions(seen) if seen is not None else ()),
    ]  # fmt: skip
    return {
        "held": all(held for _, held, _ in conditions),
        "conditions": conditions, "failures": ledger.failures, "fates": fates(ledger),
        "requests": ledger.total, "answered": ledger.count(ANSWERED),
        "refused": ledger.count("refused"), "left": ledger.count(LEFT),
        "cut": ledger.count(CUT), "checked": ledger.checked,
        "generated_tokens": ledger.generated_tokens, "preemptions": idle.preemptions,
        **counts, "seconds": watch.samples[-1].at_s,
        "health_ms": health_ms, "rss": memory,
        "attacks": {} if seen is None else seen.outcomes,
        "bystanders": {} if seen is None else seen.figures,
        "load": _mean_gauges(watch.samples),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """Results of attacks.

    Attributes:
        outcomes: counts by attack.
        figures: result of `Bystanders.figures`.
        max_pause_s: maximum pause of a bystander's stream.
    """

    outcomes: Mapping[str, Mapping[str, int]]
    figures: Mapping[str, Any]
    max_health_s: float
    max_pause_s: float


def attack_conditions(seen: Seen) -> list[tuple[str, bool, str]]:
    """Return the conditions of a soak with attacks."""
    fates = seen.figures["bystanders"]
    own_ms = seen.figures["own_delay_ms"]
    unwanted = [
        f"{name}: {number} {outcome}"
        for name, outcomes in seen.outcomes.items()
        for outcome, number in outcomes.items()
        if outcome not in ATTACKS[name].allowed | LOADED
    ]
    return [
        (
            "bystanders lose no answer and get the bits of those taken alone",
            not fates.get(LOST) and not fates.get(OTHER_BITS) and fates.get(OK, 0) > 0,
            ", ".join(f"{number:,} {fate}" for fate, number in fates.items()),
        ),
        (
            "a bystander's stream goes on",
            seen.figures["gap_ms"] <= 1000 * seen.max_pause_s + own_ms,
            f"longest pause {seen.figures['gap_ms']} ms, of which its own process {own_ms} ms",
        ),
        (
            "a bystander's /health is answered",
            seen.figures["health_ms"] <= 1000 * seen.max_health_s + own_ms,
            f"longest {seen.figures['health_ms']} ms",
        ),
        (
            "attackers get what they may",
            bool(seen.outcomes) and not unwanted,
            ", ".join(unwanted) or f"{sum(map(len, seen.outcomes.values()))} kinds of outcome",
        ),
    ]


def rss_figures(samples: Sequence[Sample], idle: Sample) -> dict[str, Any]:
    """Compare resident memory after a minute (or half) of load with the end.

    The end is the larger of the last samples and the idle one. `growth` is relative; None if
    unknown.
    """
    known = [(sample.at_s, sample.rss_bytes) for sample in samples if sample.rss_bytes is not None]
    if not known or idle.rss_bytes is None:
        return {"growth": None, "text": "unknown here"}
    last_s = known[-1][0]
    from_s = min(_RSS_AFTER_S, last_s / 2)
    window_s = min(_RSS_WINDOW_S, last_s / 5)
    before = statistics.median(rss for at_s, rss in known if from_s <= at_s <= from_s + window_s)
    after = statistics.median(rss for at_s, rss in known if at_s >= last_s - window_s)
    growth = max(after, idle.rss_bytes) / before - 1
    text = (
        f"{_mib(before)} after {from_s:.0f} s, {_mib(after)} at the end of the load, "
        f"{_mib(idle.rss_bytes)} idle: {growth:+.1%}"
    )
    return {
        "growth": growth,
        "before_bytes": before,
        "after_bytes": after,
        "idle_bytes": idle.rss_bytes,
        "text": text,
    }


def fates(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Return requests by kind and fate."""
    counts: dict[str, dict[str, int]] = {}
    for (kind, fate), number in sorted(ledger.fates.items()):
        counts.setdefault(kind, {})[fate] = number
    return counts


def table(verdict: Mapping[str, Any]) -> str:
    """Format the verdict as a table."""
    rows = [
        f"{kind:32} " + ", ".join(f"{number:,} {fate}" for fate, number in counts.items())
        for kind, counts in verdict["fates"].items()
    ]
    rows += [
        f"{'attack ' + name:32} "
        + ", ".join(f"{number:,} {outcome}" for outcome, number in counts.items())
        for name, counts in verdict["attacks"].items()
    ]
    conditions = [
        f"{'ok  ' if held else 'FAIL'}  {name:62} {seen}"
        for name, held, seen in verdict["conditions"]
    ]
    return "\n".join(
        [*rows, "", *conditions, *(f"      {failure}" for failure in verdict["failures"])]
    )


def _counts(first: Sample, last: Sample) -> dict[str, float]:
    """Return how much the counters grew between two samples."""
    names = ("computed_tokens", "drafted_tokens", "accepted_tokens")
    return {name: getattr(last, name) - getattr(first, name) for name in names}


def _draft_conditions(counts: Mapping[str, float]) -> list[tuple[str, bool, str]]:
    """Return the conditions of a soak with speculative decoding."""
    text = "{drafted_tokens:,.0f} drafted, {accepted_tokens:,.0f} accepted".format(**counts)
    return [("drafted tokens are verified", counts["drafted_tokens"] > 0, text)]


def _mean_gauges(samples: Sequence[Sample]) -> dict[str, float]:
    return {
        name: round(statistics.mean(getattr(sample, name) for sample in samples), 3)
        for name in ("running", "waiting", "kv_usage")
    }


def _are_few(files: tuple[int | None, int | None]) -> bool:
    before, after = files
    return before is None or after is None or after <= before + _MAX_NEW_FILES


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    ranks = {"median": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "max": len(ordered) - 1}
    return {name: round(1000 * ordered[rank], 1) for name, rank in ranks.items()}


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
