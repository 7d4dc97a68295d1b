"""Run `nanovllm bench` in a test, and check what holds for every report."""

import json
from typing import Any

import pytest

from nanovllm.cli.main import main

MACHINE = {"cpu", "cores", "os", "python", "numpy", "blas", "blas_threads", "nanovllm"}


def bench(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """Run `nanovllm bench` without --limits by default; return the JSON of its last line.

    An argument may be several words.
    """
    words = " ".join(map(str, arguments)).split()
    quick = ["--no-limits"] if arguments[0] == "latency" and "--limits" not in words else []
    assert main(["bench", *words, *quick]) == code
    out = capsys.readouterr().out
    record: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert sum(line.startswith("{") for line in out.splitlines()) == 1
    assert set(record["machine"]) == MACHINE
    assert record["machine"]["cpu"] in out
    assert f"NumPy {record['machine']['numpy']}" in out
    return record


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run `nanovllm bench`, which must print a one-line error; return that line."""
    assert main(["bench", *" ".join(map(str, arguments)).split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nanovllm: ")
    assert err.count("\n") == 1
    return err
