"""Draw docs/images/ablations.svg from the runs of examples/ablations.py.

Run: python tools/ablation_chart.py [FOLDER]
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.contenders import ROOT
from nanovllm.cli.svg import picture, text
from tools.loss_chart import HEIGHT, RIGHT, axes, x_of, y_of

CHART = ROOT / "docs" / "images" / "ablations.svg"
TITLE = "Training without one part: validation loss by step"
_COLORS = ("#0969da", "#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#9a6700", "#cf222e")
_WIDTH = RIGHT + 200
_LINE = 17  # pixels between two labels


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the chart into a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("ablations"))
    parser.add_argument("--output", type=Path, default=CHART, metavar="FILE")
    parsed = parser.parse_args(arguments)
    lines = {}
    for file in sorted(parsed.folder.glob("*/metrics.jsonl")):
        rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        lines[file.parent.name] = [(row["step"], row["val_loss"]) for row in rows]
    parsed.output.write_text(draw(lines), encoding="utf-8")
    print(parsed.output)
    return 0


def draw(lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Return the chart of runs, each (step, loss) by the name of its missing part, as SVG."""
    x_scale = (0.0, float(max(points[-1][0] for points in lines.values())))
    y_scale = (0.0, max(loss for points in lines.values() for _, loss in points))
    parts = axes(x_scale, y_scale)
    y_label = 0.0
    ordered = sorted(lines.items(), key=lambda line: -line[1][-1][1])
    for color, (name, points) in zip(_COLORS, ordered, strict=False):
        path = "L".join(f"{x_of(x_scale, step)} {y_of(y_scale, loss)}" for step, loss in points)
        parts.append(f'<path style="stroke: {color}" d="M{path}"/>')
        y_end = y_of(y_scale, points[-1][1])
        y_label = max(y_end, y_label + _LINE)
        link = f"M{RIGHT + 2} {y_end}L{RIGHT + 14} {y_label}h10"
        parts.append(f'<path style="stroke: {color}" d="{link}"/>')
        label = "whole" if name == "whole" else f"without {name}"
        parts.append(text(RIGHT + 30, y_label + 4, f"{label}: {points[-1][1]:.2f}", "value"))
    return picture(TITLE, _WIDTH, HEIGHT, parts)


if __name__ == "__main__":
    sys.exit(main())
