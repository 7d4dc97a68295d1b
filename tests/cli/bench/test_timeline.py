"""The picture of a step: blocks where the threads compute, grey where they wait, and a legend."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from nanovllm.cli.bench.step_times import StepTimes
from nanovllm.cli.bench.timeline import draw_timeline

SVG = "{http://www.w3.org/2000/svg}"
MS = 1_000_000
STEP = StepTimes(
    7 * MS,
    17 * MS,
    ("embed", "qkv", "attention", "qkv", "attention"),
    np.array(
        [
            [[1, 2, 2], [1, 2, 2]],
            [[2, 3, 4], [2, 4, 4]],
            [[4, 5, 5], [4, 5, 5]],
            [[5, 6, 8], [6, 8, 8]],
            [[8, 9, 9], [0, 0, 0]],
        ],
        dtype=np.int64,
    )
    * MS
    + 7 * MS,
    tokens=2,
    rows=2,
    keys=9,
)
STEP.moments[4, 1] = 0


def blocks(name: str) -> list[tuple[float, float, float]]:
    """Return x, y and width of the rectangles of an operation, without that of the legend."""
    root = ElementTree.fromstring(draw_timeline(STEP, "A step"))
    paths = [path for path in root.iter(f"{SVG}path") if path.findtext(f"{SVG}title") == name]
    found = [
        tuple(map(float, match))
        for path in paths
        for match in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v34", path.attrib["d"])
    ]
    return [(x, y, width) for x, y, width in found]


def test_a_block_is_where_its_thread_computes() -> None:
    left, ms, first, second = 84, 85.2, 72, 114  # of a step of 10 ms in 852 pixels
    expected = [(2, first, 1), (5, first, 1), (2, second, 2), (6, second, 2)]
    assert blocks("qkv") == [
        pytest.approx((left + ms * at, y, ms * width), abs=0.01) for at, y, width in expected
    ]
    assert len(blocks("attention")) == 3, "thread 1 has not come to the second layer's"
    waits = [(3, first, 1), (6, first, 2)]
    assert blocks("waiting") == [
        pytest.approx((left + ms * at, y, ms * width), abs=0.01) for at, y, width in waits
    ]


def test_the_picture_has_a_title_units_threads_layers_and_a_legend() -> None:
    root = ElementTree.fromstring(draw_timeline(STEP, "A step of <a & b>"))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert texts[0] == root.findtext(f"{SVG}title") == "A step of <a & b>"
    assert {"time in ms", "thread 0", "thread 1", "layer", "10"} <= set(texts)
    assert "qkv: 5.00 ms, 50%" in texts
    assert "other operations: 1.00 ms, 10%" in texts, "embed"
    assert "Python: 2.00 ms, 20%" in texts
    assert texts[-1] == "waiting for other threads"
    fills = re.findall(r"fill:(#\w+)", draw_timeline(STEP, "A step"))
    assert len(set(fills)) == 5, "embed, qkv, attention, Python and waiting differ"
