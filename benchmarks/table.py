"""Print the results of the benchmarks as Markdown tables, or write them into a page.

Run: python benchmarks/table.py compare.json roofline.json --write docs/maintainers/measurements.md

It reads the JSON of compare.py, roofline.py, engine_soak.py, model_sizes.py, training.py and
nanogpt.py, and of replicas.py, routing.py and simulate.py in scaling/. In the page, the table of a
benchmark is between <!-- compare: begin --> and <!-- compare: end -->, and so on.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.scaling.tables import replicas_lines, routing_lines, simulation_lines

Record = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of JSON files, or write them into a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="results written with --json"
    )
    parser.add_argument(
        "--write", type=Path, default=None, metavar="PAGE", help="write the tables into this page"
    )
    parsed = parser.parse_args(arguments)
    for file in parsed.files:
        record = json.loads(file.read_text(encoding="utf-8"))
        text = markdown(record)
        if parsed.write is None:
            print(text)
        else:
            page = parsed.write.read_text(encoding="utf-8")
            parsed.write.write_text(insert(page, record["benchmark"], text), encoding="utf-8")
    return 0


def markdown(record: Record) -> str:
    """Return the table of one benchmark, followed by the date and the machine."""
    tables: dict[str, Callable[[Record], list[str]]] = {
        "compare": _compare,
        "roofline": _roofline,
        "soak": _soak,
        "sizes": _sizes,
        "training": training_lines,
        "nanogpt": nanogpt_lines,
        "replicas": replicas_lines,
        "routing": routing_lines,
        "simulate": simulation_lines,
    }
    machine = record["machine"]
    origin = (
        f"{record['date'][:10]}, {machine['cpu']}, {record['threads']} threads, "
        f"seed {record['seed']}, nanovllm {machine['nanovllm']}"
    )
    return "\n".join([*tables[record["benchmark"]](record), "", origin])


def insert(page: str, name: str, text: str) -> str:
    """Replace the text between the markers `name`; raise ValueError if the page has none."""
    pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    if pattern.search(page) is None:
        raise ValueError(
            f"the page has no markers for {name}; "
            f"add the lines '<!-- {name}: begin -->' and '<!-- {name}: end -->'"
        )
    return pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)


def _compare(record: Record) -> list[str]:
    workloads = list(next(iter(record["classes"].values()))["ratios"])
    lines = [f"| | {' | '.join(workloads)} |", "|---" * (len(workloads) + 1) + "|"]
    for kind, found in record["classes"].items():
        for name, contender in found["contenders"].items():
            label = f"**{kind}**: {name}" if name == "nanovllm" else name
            note = f" ({contender['note']})" if "note" in contender else ""
            lines.append(
                _row(
                    label + note,
                    [_speed(contender["workloads"].get(workload)) for workload in workloads],
                )
            )
        bests = [found["best_peer"].get(workload) for workload in workloads]
        lines.append(
            _row(
                f"ratio, {kind}",
                ["-" if best is None else f"**{best[1]:.2f}** by {best[0]}" for best in bests],
            )
        )
    return lines


def _roofline(record: Record) -> list[str]:
    lines = [
        "| | share of the limit, median | quartiles | range | tokens/s | limit |",
        "|---|---|---|---|---|---|",
    ]
    for kind, works in record["classes"].items():
        for workload, found in works.items():
            share, unit = found["share"], "GB/s" if workload == "decode1" else "Gop/s"
            spread = [
                f"{share[low]:.0%} to {share[high]:.0%}"
                for low, high in (("p25", "p75"), ("min", "max"))
            ]
            limit = f"{found['limit_per_s']['median'] / 1e9:,.0f} {unit}"
            lines.append(
                _row(
                    f"{kind}, {workload}",
                    [
                        f"{share['median']:.0%}",
                        *spread,
                        f"{found['tokens_per_s']['median']:,.0f}",
                        limit,
                    ],
                )
            )
    return lines


def _soak(record: Record) -> list[str]:
    growth = record["memory_growth_bytes"]
    memory = "-" if growth is None else f"{growth / 2**20:+.1f} MiB"
    rates = [interval["tokens_per_s"] for interval in record["intervals"]]
    cells = [
        f"{record['minutes']:g} minutes",
        memory,
        f"{-record['speed_loss']:+.1%}",
        f"{min(rates):,.0f} to {max(rates):,.0f}",
    ]
    return [
        "| | length | memory | speed, last quarter against first | tokens/s |",
        "|---|---|---|---|---|",
        _row(record["type"], cells),
    ]


def _sizes(record: Record) -> list[str]:
    lines = [
        "| model | parameters | type | memory | decode, tokens/s | prefill, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for point in record["points"]:
        memory = point["resident_bytes"]
        decode = point["decode_tokens_per_s"]
        cells = [
            f"{point['parameters'] / 1e6:,.0f}M",
            point["type"],
            "-" if memory is None else f"{memory / 1e9:.1f} GB",
            f"{decode:,.0f}" if decode >= 10 else f"{decode:.1f}",
            f"{point['prefill_tokens_per_s']:,.0f}",
        ]
        lines.append(_row(point["size"], cells))
    return lines


def training_lines(record: Record) -> list[str]:
    """Return the table of training.py."""
    lines = [
        "| | tokens/s | ms per step | share of peak | ratio to torch | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for found in record["settings"]:
        for number, (name, contender) in enumerate(found["contenders"].items()):
            share, ratio = contender["share_of_peak"], contender["ratio_to_torch"]
            memory = contender["peak_bytes"]
            cells = [
                f"{contender['tokens_per_s']:,.0f}",
                f"{contender['step_s']['median'] * 1e3:,.1f}",
                "-" if share is None else f"{share:.0%}",
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if memory is None else f"{memory / 1e6:,.0f} MB",
            ]
            lines.append(_row(f"**{found['setting']}**: {name}" if number == 0 else name, cells))
    return lines


def nanogpt_lines(record: Record) -> list[str]:
    """Return the table of nanogpt.py: validation losses at a few steps."""
    runs = record["runs"]
    steps = [one["step"] for one in next(iter(runs.values()))]
    chosen = sorted({steps[round(part * (len(steps) - 1) / 4)] for part in range(5)})
    lines = [
        f"| validation loss at step | {' | '.join(f'{step:,}' for step in chosen)} |",
        "|---" * (len(chosen) + 1) + "|",
    ]
    for name, evaluations in runs.items():
        losses = {one["step"]: one["val_loss"] for one in evaluations}
        lines.append(_row(name, [f"{losses[step]:.4f}" for step in chosen]))
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _speed(found: Record | None) -> str:
    if found is None:
        return "-"
    share = found["share_of_limit"]
    return f"{found['tokens_per_s']['median']:,.0f}" + ("" if share is None else f" ({share:.0%})")


if __name__ == "__main__":
    sys.exit(main())
