"""The soak of the engine loops over its workload and judges memory and speed."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.make_model import make_model
from tests.load import engine_soak


def test_soak_loops_and_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a second passes whenever the program asks
    monkeypatch.setattr(engine_soak, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(engine_soak, "SPEED_LOSS", 1.0)  # on a busy machine speed goes up and down
    model = make_model(tmp_path, n_embd=32, n_layer=2, n_head=2, vocab_size=300, n_positions=128)
    flags = ["--ours", '{"backend": "numpy"}', "--scale", "8", "--threads", "1"]
    times = ["--minutes", "0.25", "--interval-s", "3"]
    assert engine_soak.main(["--model", str(model), *flags, *times]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(record["intervals"]) == 3
    assert all(interval["tokens_per_s"] > 0 for interval in record["intervals"])


@pytest.mark.parametrize(
    ("speeds", "memory", "is_flat"),
    [
        ([50, 100, 101, 99, 100, 98], [1, 2, 2, 2, 2, 2], True),
        ([50, 100, 100, 95, 85, 80], [2, 2, 2, 2, 2, 2], False),
        ([100] * 6, [1, 1, 100, 200, 300, 400], False),
        ([100] * 6, [None] * 6, True),
    ],
)
def test_soak_compares_the_end_with_the_beginning(
    speeds: list[float], memory: list[int | None], is_flat: bool
) -> None:
    intervals = [
        {"tokens_per_s": speed, "rss_bytes": None if size is None else size << 20}
        for speed, size in zip(speeds, memory, strict=True)
    ]
    assert engine_soak.judge(intervals)["is_flat"] is is_flat
