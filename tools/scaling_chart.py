"""Draw docs/images/scaling.svg from the results of simulate.py.

Run: python -m tools.scaling_chart scaling.json

Needs matplotlib. Both axes of the times are logarithmic: a factor of two has the same length
everywhere.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks.contenders import ROOT
from benchmarks.scaling.simulator import POLICIES

CHART = ROOT / "docs" / "images" / "scaling.svg"
# distinguishable with colour blindness (Okabe and Ito)
_COLOURS = {"round-robin": "#d55e00", "least-loaded": "#009e73", "prefix": "#0072b2"}
_MARKERS = {"round-robin": "s", "least-loaded": "^", "prefix": "o"}
_ARRIVALS = {"poisson": "Poisson arrivals", "bursts": "bursts of 4 times the rate"}
_SIZE_INCHES = (8.0, 5.4)
Run = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the chart into a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="results of simulate.py, written with --json")
    parser.add_argument("--output", type=Path, default=CHART, metavar="FILE")
    parsed = parser.parse_args(arguments)
    draw(json.loads(parsed.file.read_text(encoding="utf-8")), parsed.output)
    print(parsed.output)
    return 0


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the chart of a simulation: times to the first token above, hit rates below."""
    # Keep text as text, and the same bytes for the same data.
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "nanovllm", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        name = Path(record["model"]).name
        figure.suptitle(f"Simulated replicas of {name}, the same load for each replica")
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, (arrivals, title) in enumerate(_ARRIVALS.items()):
            runs = [run for run in record["runs"] if run["arrivals"] == arrivals]
            times, hits = panels[0][column], panels[1][column]
            for policy in POLICIES:
                shown = [run for run in runs if run["policy"] == policy and has_enough(run, record)]
                _draw_policy(policy, shown, times, hits)
            single = [run for run in runs if run["policy"] == "prefix" and run["ingresses"] == 1]
            times.plot(
                [run["replicas"] for run in single], [1000 * run["ttft_p50_s"] for run in single],
                label="prefix, one ingress", color="#888888", linestyle=":", zorder=1,
            )  # fmt: skip
            times.set(title=title, xscale="log", yscale="log")
            times.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            times.yaxis.set_minor_locator(NullLocator())
            times.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,.0f}"))
            hits.set(xscale="log", ylim=(0, 1), xlabel="replicas")
            hits.yaxis.set_major_formatter(PercentFormatter(1.0))
            counts = sorted({run["replicas"] for run in runs})
            hits.set_xticks(counts, [str(count) for count in counts])
            hits.minorticks_off()
            for panel in (times, hits):
                panel.grid(visible=True, which="major", linewidth=0.4, color="#dddddd")
                panel.set_axisbelow(True)
        panels[0][0].set_ylabel("time to first token, ms\n(solid p50, dashed p99)")
        panels[1][0].set_ylabel("prompt tokens found cached")
        panels[0][0].legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def has_enough(run: Run, record: Run) -> bool:
    """Return whether a run has an ingress for each group of replicas."""
    return bool(run["ingresses"] == math.ceil(run["replicas"] / record["replicas_per_ingress"]))


def _draw_policy(policy: str, runs: Sequence[Run], times: Any, hits: Any) -> None:
    counts = [run["replicas"] for run in runs]
    look = {"color": _COLOURS[policy], "marker": _MARKERS[policy], "markersize": 3.5}
    times.plot(counts, [1000 * run["ttft_p50_s"] for run in runs], label=policy, **look)
    times.plot(counts, [1000 * run["ttft_p99_s"] for run in runs], linestyle="--", **look)
    hits.plot(counts, [run["hit_rate"] for run in runs], **look)


if __name__ == "__main__":
    sys.exit(main())
