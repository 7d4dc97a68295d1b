"""Print the results of the benchmarks as Markdown tables, or write them into a page.

Run: python benchmarks/table.py compare.json roofline.json --write docs/maintainers/measurements.md

It reads the JSON of every benchmark, which prints the same table at its end. In the page, the table
of a benchmark is between <!-- compare: begin --> and <!-- compare: end -->, and so on.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
        "step_profile": _step_profile,
        "soak": _soak,
        "sizes": _sizes,
        "http_cost": _http_cost,
        "training": _training,
        "training_profile": _training_profile,
        "nanogpt": _nanogpt,
        "speculation": _speculation,
        "speculation-peers": _speculation_peers,
        "replicas": _replicas,
        "routing": _routing,
        "simulate": _simulation,
        "front_cost": _front_cost,
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
    lines = _header("", *workloads)
    for kind, found in record["classes"].items():
        for name, contender in found["contenders"].items():
            label = f"**{kind}**{_peak_note(kind, found)}: {name}" if name == "nanovllm" else name
            note = f" ({contender['note']})" if "note" in contender else ""
            speeds = (_speed(contender["workloads"].get(workload)) for workload in workloads)
            lines.append(_row(label + note, *speeds))
        bests = [found["best_peer"].get(workload) for workload in workloads]
        ratios = ("-" if best is None else f"**{best[1]:.2f}** by {best[0]}" for best in bests)
        lines.append(_row(f"ratio, {kind}", *ratios))
    return lines


def _peak_note(kind: str, found: Mapping[str, Any]) -> str:
    """Return of which type's peak the shares are, where it is another type."""
    peak_type = found.get("peak_type") or kind
    return "" if peak_type == kind else f" (of {peak_type}'s peak)"


def _roofline(record: Record) -> list[str]:
    lines = _header("", "share of the limit, median", "quartiles", "range", "tokens/s", "limit")
    for kind, works in record["classes"].items():
        for workload, found in works.items():
            share, unit = found["share"], "GB/s" if workload == "decode1" else "Gop/s"
            cells = [
                f"{share['median']:.0%}",
                f"{share['p25']:.0%} to {share['p75']:.0%}",
                f"{share['min']:.0%} to {share['max']:.0%}",
                f"{found['tokens_per_s']['median']:,.0f}",
                f"{found['limit_per_s']['median'] / 1e9:,.0f} {unit}",
            ]
            lines.append(_row(f"{kind}, {workload}", *cells))
    return lines


def _step_profile(record: Record) -> list[str]:
    lines = _header("", "ms", "of the step", "waiting", "of bandwidth", "of peak")
    for result in record["results"]:
        label = f"**{result['type']}, {result['step']}**"
        lines.append(_row(label, f"{1e3 * result['step_s']:.2f}", "", "", "", ""))
        for each in result["operations"]:
            reached = (each["bandwidth_fraction"], each["peak_fraction"])
            shares = ("" if share is None else f"{share:.0%}" for share in reached)
            cells = f"{1e3 * each['seconds']:.2f}", f"{each['share']:.0%}"
            lines.append(_row(each["name"], *cells, f"{1e3 * each['wait_s']:.2f}", *shares))
    return lines


def _soak(record: Record) -> list[str]:
    growth = record["memory_growth_bytes"]
    memory = "-" if growth is None else f"{growth / 2**20:+.1f} MiB"
    rates = [interval["tokens_per_s"] for interval in record["intervals"]]
    speed, rate = f"{-record['speed_loss']:+.1%}", f"{min(rates):,.0f} to {max(rates):,.0f}"
    return [
        *_header("", "length", "memory", "speed, last quarter against first", "tokens/s"),
        _row(record["type"], f"{record['minutes']:g} minutes", memory, speed, rate),
    ]


def _sizes(record: Record) -> list[str]:
    lines = _header(
        "model", "parameters", "type", "memory", "decode, tokens/s", "prefill, tokens/s"
    )
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
        lines.append(_row(point["size"], *cells))
    return lines


def _http_cost(record: Record) -> list[str]:
    lines = _header("", "tokens/s", "cost", "client's processor time")
    for kind, ways in record["classes"].items():
        for way, figures in ways.items():
            cells = (f"{figures['cost']:.1%}", f"{figures['client_share']:.1%} of one core")
            lines.append(_row(f"{kind}, {way}", f"{figures['tokens_per_s']:,.0f}", *cells))
    return lines


def _training(record: Record) -> list[str]:
    lines = _header("", "tokens/s", "ms per step", "share of peak", "ratio to torch", "peak memory")
    for found in record["settings"]:
        for number, (name, contender) in enumerate(found["contenders"].items()):
            share, ratio = contender["share_of_peak"], contender["ratio_to_torch"]
            memory = contender["peak_bytes"]
            cells = [
                f"{contender['tokens_per_s']:,.0f}",
                f"{contender['step_s']['median'] * 1e3:,.1f}",
                "-" if share is None else f"{share:.0%}{_peak_note(contender['dtype'], contender)}",
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if memory is None else f"{memory / 1e6:,.0f} MB",
            ]
            lines.append(_row(f"**{found['setting']}**: {name}" if number == 0 else name, *cells))
    return lines


def _training_profile(record: Record) -> list[str]:
    """Return the operations that take at least half a percent of a step."""
    lines = _header("", "ms", "of the step", "waiting", "of peak")
    for result in record["results"]:
        total_s, peak = result["step_s"], result["peak_operations_per_s"]
        lines.append(_row(f"**{result['setting']}**", f"{1e3 * total_s:.2f}", "", "", ""))
        for each in result["operations"]:
            seconds, work = each["seconds"], each["operations"]
            if seconds >= 0.005 * total_s:
                share = f"{work / seconds / peak:.0%}" if work and peak else ""
                cells = f"{1e3 * seconds:.2f}", f"{seconds / total_s:.1%}"
                lines.append(_row(each["name"], *cells, f"{1e3 * each['wait_s']:.2f}", share))
    return lines


def _nanogpt(record: Record) -> list[str]:
    """Return validation losses at a few steps."""
    runs = record["runs"]
    steps = [one["step"] for one in next(iter(runs.values()))]
    chosen = sorted({steps[round(part * (len(steps) - 1) / 4)] for part in range(5)})
    lines = _header("validation loss at step", *(f"{step:,}" for step in chosen))
    for name, evaluations in runs.items():
        losses = {one["step"]: one["val_loss"] for one in evaluations}
        lines.append(_row(name, *(f"{losses[step]:.4f}" for step in chosen)))
    return lines


def _speculation(record: Record) -> list[str]:
    """Return ratios to no drafts by workload and method, with accepted and drafted tokens."""
    rows: dict[str, dict[str, Record]] = {}
    for found in record["results"]:
        rows.setdefault(_case_label(found), {})[found["method"]] = found
    methods = list(dict.fromkeys(found["method"] for found in record["results"]))
    lines = _header("", "tokens/s without drafts", *methods)
    for label, by_method in rows.items():
        plain = statistics.median(found["plain_tokens_per_s"] for found in by_method.values())
        cells = (_ratio(by_method.get(method)) for method in methods)
        lines.append(_row(label, f"{plain:,.0f}", *cells))
    return lines


def _ratio(found: Record | None) -> str:
    if found is None:
        return "-"
    drafted = found["drafted"]
    share = f"{found['accepted'] / drafted:.0%} of {drafted:,}" if drafted else "no drafts"
    return f"**{found['ratio']['median']:.2f}** ({share})"


def _case_label(found: Record) -> str:
    temperature, streams = found["temperature"], found["streams"]
    draw = f"temperature {temperature:g}" if temperature else "greedy"
    return f"{found['type']}, {found['workload']}, {streams} at once, {draw}"


def _speculation_peers(record: Record) -> list[str]:
    """Return ratios by workload and system; what each accepted and changed; what failed."""
    results = record["results"]
    columns = list(dict.fromkeys((found["system"], found["method"]) for found in results))
    rows: dict[str, dict[tuple[str, str], Record]] = {}
    for found in results:
        rows.setdefault(_case_label(found), {})[found["system"], found["method"]] = found
    lines = _header("", *map(", ".join, columns))
    for label, by_column in rows.items():
        cells = (_ratio_and_speed(by_column.get(column)) for column in columns)
        lines.append(_row(label, *cells))
    shares = [
        (f"accepted, {name}", "accepted", "drafted", "workload", name)
        for name in dict.fromkeys(found["workload"] for found in results)
    ] + [
        (f"changed outputs, {'drawn' if value else 'greedy'}", "changed", "outputs", "temperature",
         value)
        for value in dict.fromkeys(found["temperature"] for found in results)
    ]  # fmt: skip
    lines += ["", *_header("", *(title for title, *_ in shares))]
    for column in columns:
        own = [found for found in results if (found["system"], found["method"]) == column]
        cells = (
            _share(part, whole, [found for found in own if found[key] == value])
            for _, part, whole, key, value in shares
        )
        lines.append(_row(", ".join(column), *cells))
    return lines + [f"\n{name}: {reason}" for name, reason in record["problems"].items()]


def _ratio_and_speed(found: Record | None) -> str:
    if found is None:
        return "-"
    return f"**{found['ratio']['median']:.2f}** ({found['tokens_per_s']:,.0f})"


def _share(part: str, whole: str, results: Sequence[Record]) -> str:
    total = sum(found[whole] for found in results)
    return f"{sum(found[part] for found in results) / total:.0%} of {total:,}" if total else "-"


def _replicas(record: Record) -> list[str]:
    """Return deployments by class and number of clients."""
    header = ("clients", "deployment", "tokens/s", "TTFT p50", "TTFT p99", "ratio")
    lines = []
    for kind, figures in record["classes"].items():
        lines += [f"**{kind}**", "", *_header(*header)]
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
        for figure, ms in figures["overhead_ms"].items():
            lines += [f"{figure} of a replica less that of a server of 1 thread: {ms:+.2f} ms", ""]
    return lines[:-1]


def _routing(record: Record) -> list[str]:
    """Return measured and predicted figures of each policy."""
    lines = _header("routing", "", *_RESULT)
    for policy, figures in record["policies"].items():
        for kind in ("measured", "predicted"):
            lines.append(_row(policy, kind, *_result(figures[kind])))
    return lines


def _simulation(record: Record) -> list[str]:
    """Return figures by arrivals, replicas and policy."""
    lines = _header("arrivals", "replicas", "ingresses", "busy", "routing", *_RESULT)
    for run in record["runs"]:
        lines.append(
            _row(run["arrivals"], run["replicas"], run["ingresses"],
                 f"{run['ingress_busy']:.0%}", run["policy"], *_result(run))
        )  # fmt: skip
    return lines


def _front_cost(record: Record) -> list[str]:
    lines = _header("", "a request", "a stream")
    for name, request_s in record["request_s"].items():
        stream_s = record["stream_s"][name]
        lines.append(_row(name, f"{1000 * request_s:.2f} ms", f"{1000 * stream_s:.2f} ms"))
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


def _header(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _row(*cells: object) -> str:
    return "|" + "".join(f" {cell}".rstrip() + " |" for cell in cells)


def _speed(found: Record | None) -> str:
    if found is None:
        return "-"
    share = found["share_of_limit"]
    return f"{found['tokens_per_s']['median']:,.0f}" + ("" if share is None else f" ({share:.0%})")


if __name__ == "__main__":
    sys.exit(main())
