"""Tables of docs/maintainers/measurements.md from replicas.py, routing.py and simulate.py."""

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def replicas_lines(record: Record) -> list[str]:
    """Return the table of replicas.py: deployments by class and number of clients."""
    header = ("clients", "deployment", "tokens/s", "TTFT p50", "TTFT p99", "ratio")
    lines = []
    for kind, figures in record["classes"].items():
        lines += [f"**{kind}**", "", *_header(header)]
        names = list(figures["deployments"])
        for clients, ratio in figures["ratios"].items():
            for name in names:
                found = figures["deployments"][name].get(clients)
                if found is None:
                    continue
                shown = f"{ratio:.2f}" if name == names[1] else "1.00" if name == names[0] else "-"
                lines.append(
                    _row(clients, name, f"{found['output_throughput']:,.0f}",
                         f"{found['median_ttft_ms']:,.0f} ms", f"{found['p99_ttft_ms']:,.0f} ms",
                         shown)
                )  # fmt: skip
        lines.append("")
    return lines[:-1]


def routing_lines(record: Record) -> list[str]:
    """Return the table of routing.py: measured and predicted figures of each policy."""
    lines = _header(("routing", "", *_RESULT))
    for policy, figures in record["policies"].items():
        for kind in ("measured", "predicted"):
            lines.append(_row(policy, kind, *_result(figures[kind])))
    return lines


def simulation_lines(record: Record) -> list[str]:
    """Return the table of simulate.py: figures by arrivals, replicas and policy."""
    lines = _header(("arrivals", "replicas", "ingresses", "busy", "routing", *_RESULT))
    for run in record["runs"]:
        lines.append(
            _row(run["arrivals"], run["replicas"], run["ingresses"],
                 f"{run['ingress_busy']:.0%}", run["policy"], *_result(run))
        )  # fmt: skip
    return lines


_RESULT = ("tokens/s", "TTFT p50", "TTFT p99", "cache hits", "busiest / mean")


def _result(figures: Mapping[str, float]) -> tuple[str, ...]:
    return (
        f"{figures['tokens_per_s']:,.0f}",
        f"{1000 * figures['ttft_p50_s']:,.0f} ms",
        f"{1000 * figures['ttft_p99_s']:,.0f} ms",
        f"{figures['hit_rate']:.0%}",
        f"{figures['max_over_mean_requests']:.2f}",
    )


def _header(names: Sequence[str]) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
