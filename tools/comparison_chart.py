"""Draw docs/images/comparison.svg from the table of compare.py in docs/maintainers/measurements.md.

Run: python tools/comparison_chart.py

One panel per weight type and workload, one bar per engine.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import ROOT
from nanovllm.cli.svg import picture, text

PAGE = ROOT / "docs" / "maintainers" / "measurements.md"
CHART = ROOT / "docs" / "images" / "comparison.svg"

_TITLES = {
    "decode1": "decode, 1 sequence",
    "prefill512": "prefill, 512 tokens",
    "serve32": "32 requests at once",
}
_ENGINES = {"nanovllm": "nanovllm", "llamacpp": "llama.cpp", "openvino": "OpenVINO", "vllm": "vLLM"}
# Pixels: the picture, where the bars start, and the distances between panels and between bars.
_WIDTH, _TOP, _LEFT, _PANEL, _STEP = 880, 78, 166, 240, 19
_BAR_HEIGHT, _LONGEST_BAR = 14, 176


@dataclass(frozen=True, slots=True)
class Table:
    """Speeds in tokens per second by type, workload and engine, and the line about the machine."""

    speeds: dict[str, dict[str, dict[str, float]]]
    origin: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the chart into a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=CHART, metavar="FILE")
    parsed = parser.parse_args(arguments)
    parsed.output.write_text(draw(read(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(parsed.output)
    return 0


def read(page: str) -> Table:
    """Read the table of compare.py; of an engine's variants, keep the fastest."""
    found = re.search(r"<!-- compare: begin -->(.*?)<!-- compare: end -->", page, re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE} contains no table of compare.py; write one with table.py")
    lines = found[1].strip().splitlines()
    workloads = [cell.strip() for cell in lines[0].strip("|").split("|")[1:]]
    speeds: dict[str, dict[str, dict[str, float]]] = {}
    kind = ""
    for line in lines[2:]:
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) != len(workloads) or label.startswith("ratio"):
            continue
        if match := re.match(r"\*\*(\w+)\*\*: ", label):
            kind = match[1]
            label = label.removeprefix(match[0])
        engine = _ENGINES[label.split()[0]]
        for workload, cell in zip(workloads, cells, strict=True):
            speed = float(cell.split()[0].replace(",", ""))
            panel = speeds.setdefault(kind, {}).setdefault(workload, {})
            panel[engine] = max(speed, panel.get(engine, 0.0))
    return Table(speeds, lines[-1])


def draw(table: Table) -> str:
    """Return the chart as SVG."""
    parts: list[str] = []
    y = _TOP
    for weights, panels in table.speeds.items():
        parts.append(text(16, y + 11, weights, "strong"))
        engines = list(next(iter(panels.values())))
        for row, engine in enumerate(engines):
            kind = "strong" if engine == "nanovllm" else ""
            parts.append(text(88, y + row * _STEP + 11, engine, kind))
        for column, (workload, speeds) in enumerate(panels.items()):
            x = _LEFT + column * _PANEL
            if y == _TOP:
                parts.append(text(x, y - 14, _TITLES[workload], "strong"))
            parts += _bars(x, y, speeds)
        y += _STEP * len(engines) + 20
    parts.append(text(16, y + 8, table.origin, "note"))
    title = "GPT-2 124M on a CPU: tokens per second, higher is better"
    return picture(title, _WIDTH, y + 24, parts)


def _bars(x: int, y: int, speeds: dict[str, float]) -> list[str]:
    largest = max(speeds.values())
    parts = []
    for row, (engine, speed) in enumerate(speeds.items()):
        top = y + row * _STEP
        ours = engine == "nanovllm"
        width = round(_LONGEST_BAR * speed / largest)
        label = f"{speed:,.0f}"
        parts.append(
            f'<rect class="{"bar ours" if ours else "bar"}" x="{x}" y="{top}" width="{width}" '
            f'height="{_BAR_HEIGHT}" rx="2">'
            f"<title>{escape(engine)}: {label} tokens/s</title></rect>"
        )
        parts.append(text(x + width + 6, top + 11, label, "value strong" if ours else "value"))
    return parts


if __name__ == "__main__":
    sys.exit(main())
