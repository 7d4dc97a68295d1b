"""The numbers of docs/tutorials/quantization.md.

Run: python tools/tutorials/quantization.py

This measures the bundled model with `nanovllm eval` and `nanovllm bench latency`, which takes some
minutes on a machine that does nothing else, and writes quantization.json.
`python tools/make_tutorials.py` makes the page from that file; the worked examples need no file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm.cli.svg import picture, text
from nanovllm.hub.names import bundled_folder
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import load_config
from nanovllm.model.quantization import LARGEST_CODE, LARGEST_ROW_CODE, calibrate
from tools import comparison_chart
from tools.tutorials.drawing import STYLE, box
from tools.tutorials.pages import ROOT, Tutorial, code, table

PAGE = "quantization.md"
RECORD = Path(__file__).with_suffix(".json")
PRECISIONS = {
    "float32": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "int8": ["--quantization", "int8"],
}
COLUMN = np.array([0.304, -1.270, 0.048, 0.637])
OUTLIER_COLUMN = np.array([0.304, -25.400, 0.048, 0.637])
ROW = np.array([1.0, 0.5, -0.2, 2.0])
_FORMATS = {"float32": (1, 8, 23), "float16": (1, 5, 10), "bfloat16": (1, 8, 7), "int8": (1, 0, 7)}
"""Bits of the sign, the exponent and the fraction; the 7 bits of int8 are a whole number."""
_ROUNDS = 6


def main() -> int:
    """Measure, and write the record."""
    held_out = ROOT / "tests" / "data" / "held_out"
    evaluated = _nanovllm("eval", "--data", str(held_out), "--precision", "all", "--json")
    results = json.loads(evaluated)["results"]
    shortest: dict[str, float] = {}
    step_bytes: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, options in PRECISIONS.items():
            bench = _bench(options)
            step_bytes[name] = bench["decode_bytes_per_step"]
            latency_s = min(bench["latencies_s"])
            shortest[name] = min(latency_s, shortest.get(name, latency_s))
    record = {
        "machine": bench["machine"]["cpu"],
        "parameters": bench["parameters"],
        "bits_per_byte": {row["precision"]: row["bits_per_byte"] for row in results},
        "step_bytes": step_bytes,
        "answers": _ROUNDS * len(bench["latencies_s"]),
        "latency_s": shortest,
        **_weight_figures(),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _bench(options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        _nanovllm("bench", "latency", "--batch-size", "1", "--json", str(path), *options)
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _nanovllm(*words: str) -> str:
    command = [sys.executable, "-m", "nanovllm", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _weight_figures() -> dict[str, float]:
    """Return the rounding error of a real weight, and how large a channel can be."""
    config = load_config(bundled_folder())
    weights = load_weights(bundled_folder(), config)
    weight = weights.layers[0].qkv.weight
    columns = abs(weight).max(axis=0) / LARGEST_CODE
    peaks = [layer.qkv for layer in calibrate(config, weights).layers]
    return {
        "error_one_scale": _error(weight, columns.max()),
        "error_column_scales": _error(weight, columns),
        "largest_channel": max(float(peak.max() / np.median(peak)) for peak in peaks),
    }


def _error(weight: npt.NDArray[Any], scale: Any) -> float:
    """Return the error of rounding to multiples of `scale`, relative to the weight's size."""
    rounded = np.rint(weight / scale) * scale
    return float(np.linalg.norm(rounded - weight) / np.linalg.norm(weight))


def quantize(column: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], float]:
    """Return the codes of a column of weights, and its scale."""
    scale = float(abs(column).max()) / LARGEST_CODE
    return np.rint(column / scale), scale


def quantize_row(row: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], float, int]:
    """Return the codes of a row of inputs, its scale and its zero point."""
    low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    scale = (high - low) / LARGEST_ROW_CODE
    zero = round(-low / scale)
    return np.rint(row / scale) + zero, scale, zero


def bfloat16(value: float) -> float:
    """Return the nearest number with 8 bits of precision, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    codes, scale = quantize(COLUMN)
    large_codes, large_scale = quantize(OUTLIER_COLUMN)
    row_codes, row_scale, zero = quantize_row(ROW)
    products = (row_codes - zero) * codes
    approximate, exact = row_scale * scale * products.sum(), float(ROW @ COLUMN)
    parts = {
        "types": _types(),
        "column": code(_quantized(COLUMN, codes, scale)),
        "outlier": code(_quantized(OUTLIER_COLUMN, large_codes, large_scale)),
        "row": code(
            [
                f"input             {_numbers(ROW, '8.3f')}",
                f"row_scale         (2.0 - -0.2) / 255 = {row_scale:.5f}, zero point {zero}",
                f"row codes         {_numbers(row_codes, '8.0f')}",
                f"- zero point      {_numbers(row_codes - zero, '8.0f')}",
                f"* weight codes    {_numbers(products, '8.0f')}   sum {products.sum():.0f}",
                f"{products.sum():.0f} * {row_scale:.5f} * {scale:.2f} = {approximate:.4f}",
                f"without rounding      {exact:.4f}",
            ]
        ),
        "measured": _measured(record),
        "gpt2": _gpt2(),
    }
    facts = (
        f"{100 * record['error_one_scale']:.1f}% with one scale",
        f"{100 * record['error_column_scales']:.1f}% with one per column",
        f"{record['largest_channel']:.0f} times",
        f"the fastest of {record['answers']} answers",
    )
    return Tutorial(PAGE, parts, facts, {"number-formats.svg": _picture()})


def _types() -> str:
    rows = []
    for name, (_, exponent, fraction) in _FORMATS.items():
        if name == "int8":
            rows.append([name, "8", "-127 to 127, times a scale", "scale", "-"])
            continue
        largest = (2 - 2.0**-fraction) * 2.0 ** (2 ** (exponent - 1) - 1)
        value = {
            "float32": float(np.float32(np.pi)),
            "float16": float(np.float16(np.pi)),
            "bfloat16": bfloat16(np.pi),
        }[name]
        bits = str(1 + exponent + fraction)
        rows.append([name, bits, f"up to {largest:.3g}", f"1 / {2**fraction:,}", f"{value:.7g}"])
    return table(["type", "bits", "range", "step at 1", "pi"], rows)


def _quantized(column: npt.NDArray[Any], codes: npt.NDArray[Any], scale: float) -> list[str]:
    return [
        f"weights           {_numbers(column, '8.3f')}",
        f"scale             {abs(column).max():.2f} / 127 = {scale:.2f}",
        f"codes             {_numbers(codes, '8.0f')}",
        f"codes * scale     {_numbers(codes * scale, '8.3f')}",
        f"error             {_numbers(codes * scale - column, '8.3f')}",
    ]


def _numbers(values: npt.NDArray[Any], form: str) -> str:
    return " ".join(f"{value + 0.0:{form}}" for value in values)


def _measured(record: dict[str, Any]) -> str:
    """Return what the types cost and gain on the bundled model."""
    tokens, base = 160, "float32"
    rows = []
    for name in PRECISIONS:
        bits, latency_s = record["bits_per_byte"], record["latency_s"][name]
        rows.append(
            [
                name,
                f"{record['step_bytes'][name] / 1e6:.1f} MB",
                f"{bits[name]:.4f}",
                f"{bits[name] - bits[base]:+.4f}",
                f"{tokens / latency_s:,.0f}",
            ]
        )
    return table(["type", "read per token", "bits per byte", "cost", "tokens/s"], rows)


def _gpt2() -> str:
    """Return the speeds of GPT-2 124M in the table of compare.py."""
    measured = comparison_chart.read(comparison_chart.PAGE.read_text(encoding="utf-8"))
    speeds = {name: measured.speeds[name]["decode1"]["nanovllm"] for name in PRECISIONS}
    rows = [
        [name, f"{speed:,.0f}", f"{speed / speeds['float32']:.1f}"]
        for name, speed in speeds.items()
    ]
    return table(["GPT-2 124M", "tokens/s", "times float32"], rows)


def _picture() -> str:
    parts, left, cell = [], 110, 16
    for row, (name, bits) in enumerate(_FORMATS.items()):
        y, x = 58 + 36 * row, left
        parts.append(text(16, y + 15, name, "strong"))
        for count, kind in zip(bits, "bac", strict=True):
            for _ in range(count):
                parts.append(box(x, y, 14, 20, "", kind))
                x += cell
    keys = (("sign", "b"), ("exponent: range", "a"), ("fraction: precision", "c"))
    for index, (label, kind) in enumerate(keys):
        x = left + 160 * index
        parts.append(box(x, 206, 14, 14, "", kind))
        parts.append(text(x + 20, 218, label))
    return picture("Bits of a number in four types", 660, 236, parts, STYLE)


if __name__ == "__main__":
    sys.exit(main())
