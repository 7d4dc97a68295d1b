"""Plot the results of benchmarks/sweep.py as SVG: roofline, batch, context, model and threads.

Run: python benchmarks/plot.py sweep.json --output docs/images
It needs matplotlib: pip install 'nanovllm[bench]'

The roofline is that of Williams, Waterman and Patterson (2009): operations per second over
operations per byte, on logarithmic axes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_COLOURS = {
    "float32": "#0072b2",
    "bfloat16": "#d55e00",
    "int8": "#009e73",
}  # told apart with any kind of sight (Okabe and Ito)
_SIZE_INCHES = (5.0, 3.3)
_NAMES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M"}

Points = Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Plot all figures that have points."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what sweep.py wrote with --json")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "docs" / "images",
        metavar="FOLDER",
    )
    parsed = parser.parse_args(arguments)
    sweep = json.loads(parsed.file.read_text(encoding="utf-8"))
    parsed.output.mkdir(parents=True, exist_ok=True)
    for path in draw(sweep, parsed.output):
        print(path)
    return 0


def draw(sweep: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures of a sweep to a folder; return their paths."""
    figures: dict[str, tuple[str, Callable[[Any, Points, Mapping[str, Any]], None]]] = {
        "roofline": ("batch", _roofline),
        "batch": ("batch", _batch),
        "context": ("context", _context),
        "model-size": ("model", _model),
        "threads": ("threads", _threads),
    }
    written = []
    # Text stays text, and ids and dates do not change between runs.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "nanovllm",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        for name, (kind, fill) in figures.items():
            points = [point for point in sweep["points"] if point["sweep"] == kind]
            if not points:
                continue
            figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
            axes = figure.add_subplot()
            fill(axes, points, sweep)
            axes.grid(visible=True, which="major", linewidth=0.4, color="#dddddd")
            axes.set_axisbelow(True)
            written.append(folder / f"{name}.svg")
            figure.savefig(written[-1], metadata={"Date": None})
    return written


def _roofline(axes: Any, points: Points, sweep: Mapping[str, Any]) -> None:
    """Plot the limits of each type, decode at each batch size, and prefill."""
    limits = sweep["limits"][str(sweep["threads"])]
    for kind, own in _by_type(points):
        decode = [
            (
                point["step_operations"] / point["step_bytes"],
                point["step_operations"] / point["step_s"] / 1e9,
            )
            for point in own
        ]
        largest = max(own, key=lambda point: point["prefill_operations"])
        prefill = (
            largest["prefill_operations"] / largest["prefill_bytes"],
            largest["prefill_operations"] / largest["prefill_s"] / 1e9,
        )
        bandwidth = statistics.median(point["bandwidth_bytes_per_s"] for point in own)
        if limits[kind] is not None:
            intensity = np.geomspace(decode[0][0] / 2, prefill[0] * 2, 200)
            axes.plot(
                intensity,
                np.minimum(intensity * bandwidth, limits[kind]) / 1e9,
                color=_COLOURS[kind],
                linewidth=0.8,
            )
        axes.plot(
            *zip(*decode, strict=True),
            "o",
            color=_COLOURS[kind],
            markersize=3.5,
            label=f"{kind}, decoding",
        )
        axes.plot(
            *prefill,
            "s",
            color=_COLOURS[kind],
            markersize=5,
            markerfacecolor="none",
            label=f"{kind}, reading a prompt",
        )
        if kind == "float32":
            for point, place in zip(own, decode, strict=True):
                axes.annotate(
                    str(point["batch"]),
                    place,
                    textcoords="offset points",
                    xytext=(3, -9),
                    fontsize=7,
                    color="#555555",
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte of weights and cache",
        ylabel="GFLOPS (GOPS for int8)",
    )
    axes.legend(fontsize=7, frameon=False, loc="lower right")


def _batch(axes: Any, points: Points, sweep: Mapping[str, Any]) -> None:
    for kind, own in _by_type(points):
        axes.plot(
            [point["at"] for point in own],
            [point["decode_tokens_per_s"] for point in own],
            "o-",
            markersize=3.5,
            **_style(kind),
        )
    axes.set(
        xscale="log", yscale="log", xlabel="sequences decoded together", ylabel="tokens a second"
    )
    places = sorted({point["at"] for point in points})
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)


def _context(axes: Any, points: Points, sweep: Mapping[str, Any]) -> None:
    for kind, own in _by_type(points):
        axes.plot(
            [point["context"] for point in own],
            [1000 * point["step_s"] for point in own],
            "o-",
            markersize=3.5,
            **_style(kind),
        )
    axes.set(
        xlabel=f"tokens of context, {points[0]['batch']} sequences",
        ylabel="milliseconds a step",
        ylim=(0, None),
    )
    axes.legend(frameon=False)


def _model(axes: Any, points: Points, sweep: Mapping[str, Any]) -> None:
    for kind, own in _by_type(points):
        axes.plot(
            [point["parameters"] / 1e6 for point in own],
            [1000 * point["step_s"] for point in own],
            "o-",
            markersize=3.5,
            **_style(kind),
        )
    sizes = sorted(
        {(point["parameters"] / 1e6, _NAMES.get(point["at"], point["at"])) for point in points}
    )
    axes.set_xticks([size for size, _ in sizes], [name for _, name in sizes])
    axes.set(
        xlabel="parameters",
        ylabel="milliseconds a token, one sequence",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend(frameon=False)


def _threads(axes: Any, points: Points, sweep: Mapping[str, Any]) -> None:
    for kind, own in _by_type(points):
        ordered = sorted(own, key=lambda point: point["threads"])
        axes.plot(
            [point["threads"] for point in ordered],
            [point["decode_tokens_per_s"] for point in ordered],
            "o-",
            markersize=3.5,
            **_style(kind),
        )
    axes.set_xticks(sorted({point["threads"] for point in points}))
    axes.set(xlabel="threads", ylabel="tokens a second, one sequence", ylim=(0, None))
    axes.legend(frameon=False)


def _by_type(points: Points) -> list[tuple[str, Points]]:
    kinds = [kind for kind in _COLOURS if any(point["type"] == kind for point in points)]
    return [(kind, [point for point in points if point["type"] == kind]) for kind in kinds]


def _style(kind: str) -> dict[str, str]:
    return {"color": _COLOURS[kind], "label": kind}


if __name__ == "__main__":
    sys.exit(main())
