"""Axes of charts and numbers for people."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.javascript import run_module


def call(folder: Path, module: str, function: str, cases: list[list[Any]]) -> list[Any]:
    """Return the results of a function for lists of arguments."""
    source = (
        f'import {{ {function} }} from "./{module}.js";\n'
        f"const results = {json.dumps(cases)}.map((one) => {function}(...one));\n"
        "console.log(JSON.stringify(results));"
    )
    return list(run_module(folder, source))


def scale(low: float, high: float, *, is_log: bool = False) -> dict[str, Any]:
    return {"low": low, "high": high, "isLog": is_log}


TICKS = [
    (scale(0, 2000), ["0", "500", "1000", "1500", "2000"]),
    (scale(0, 480_000), ["0", "100k", "200k", "300k", "400k"]),
    (scale(0, 3.1e9), ["0", "1B", "2B", "3B"]),
    (scale(1.58, 4.3), ["2", "3", "4"]),
    (scale(0, 3.2e-5), ["0", "1e-5", "2e-5", "3e-5"]),
    (scale(0.09, 1100, is_log=True), ["0.1", "1", "10", "100", "1000"]),
    (scale(0.9, 12, is_log=True), ["1", "2", "5", "10"]),
    (scale(0.9, 1e12, is_log=True), ["1", "1000", "1M", "1B", "1T"]),
]


def test_ticks_are_round(tmp_path: Path) -> None:
    values = call(tmp_path, "scales", "ticks", [[one, 5] for one, _ in TICKS])
    cases = [[one, ticks] for (one, _), ticks in zip(TICKS, values, strict=True)]
    assert call(tmp_path, "scales", "tickLabels", cases) == [labels for _, labels in TICKS]
    assert call(tmp_path, "scales", "ticks", [[scale(0, 1), 5, 1]]) == [[0, 1]]


def test_every_value_lies_on_its_axis(tmp_path: Path) -> None:
    lists: list[list[float]] = [
        [0],
        [1e100, -1e100],
        [3, 3],
        [-5e-324],
        [1e-3, 1e-3 + 1e-12],
        [2, 10],
        [0.1, 1e5],
    ]
    options = [
        {"fromZero": from_zero, "mayBeLog": may_be_log}
        for from_zero in (False, True)
        for may_be_log in (False, True)
    ]
    cases = [(values, option) for values in lists for option in options]
    scales = call(tmp_path, "scales", "fitScale", [list(case) for case in cases])
    pairs = [
        [fitted, value]
        for (values, _), fitted in zip(cases, scales, strict=True)
        for value in values
    ]
    positions = call(tmp_path, "scales", "fraction", pairs)
    assert all(-1e-6 <= one <= 1 + 1e-6 for one in positions)
    numbers = call(tmp_path, "scales", "ticks", [[fitted, 5] for fitted in scales])
    assert all(len(ticks) <= 7 for ticks in numbers)


def test_a_wide_range_is_logarithmic_where_allowed(tmp_path: Path) -> None:
    may_be = {"mayBeLog": True}
    cases: list[list[Any]] = [
        [[0.1, 100], may_be],
        [[0.1, 100]],
        [[0, 100], may_be],
        [[2, 10], may_be],
    ]
    scales = call(tmp_path, "scales", "fitScale", cases)
    assert [one["isLog"] for one in scales] == [True, False, False, False]


@pytest.mark.parametrize(
    ("function", "cases"),
    [
        (
            "formatCompact",
            {0: "0", 12_345: "12.3k", 999_960: "1.00M", 124_439_808: "124M", 2.05e9: "2.05B",
             3e15: "3000T"},
        ),
        (
            "formatElapsed",
            {0.04: "0.0 s", 9.96: "10 s", 59.6: "1 min 00 s", 75: "1 min 15 s",
             3599.7: "1 h 00 min", 7500: "2 h 05 min", 400_000: "4 d 15 h"},
        ),
        (
            "shortNumber",
            {0: "0", 3e-5: "3e-5", 0.001: "0.001", 21_400: "21400", 1.23456789: "1.2346",
             1e20: "1e20"},
        ),
    ],
)  # fmt: skip
def test_numbers_are_short(tmp_path: Path, function: str, cases: dict[float, str]) -> None:
    found = call(tmp_path, "format", function, [[value] for value in cases])
    assert found == list(cases.values())
