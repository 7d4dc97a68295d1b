"""`nanovllm bench threads`: the numbers of threads, the best of them, and the report."""

from pathlib import Path

import pytest

from nanovllm.cli.bench.threads import SPEEDS, Row, best_threads, thread_counts
from tests.support.bench import bench, refused


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (12, [1, 2, 3, 4, 6, 8, 12]),
        (56, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 56]),
        (64, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]),
    ],
)  # fmt: skip
def test_the_numbers_grow_by_halves_and_end_with_the_most(most: int, expected: list[int]) -> None:
    assert thread_counts(most) == expected


def row(threads: int, decode_1: float, batch: float, prefill: float) -> Row:
    return Row(threads, decode_1, batch, prefill, 1.0, 1.0)


def test_the_best_number_is_the_fewest_threads_of_nearly_the_highest_speed() -> None:
    rows = [
        row(1, 50, 100, 100),
        row(4, 99, 300, 380),
        row(8, 100, 500, 700),
        row(16, 90, 505, 900),
    ]
    assert best_threads(rows) == dict(zip(SPEEDS, (4, 8, 16), strict=True)) | {"all": 16}
    slower = [*rows[:3], row(16, 60, 505, 900)]
    assert best_threads(slower)["all"] == 8


def test_a_report_has_each_number_of_threads(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def measure(threads: int) -> float:
        read.append(threads)
        return 7e9

    monkeypatch.setattr("nanovllm.cli.bench.machine.measure_bandwidth", measure)
    work = "--max-threads 3 --batch-size 2 --input-len 6 --output-len 3 --num-iters 2"
    record = bench(capsys, "threads", tiny_model, work)
    rows = record["threads"]
    assert [row["threads"] for row in rows] == read == [1, 2, 3]
    for each in rows:
        assert all(each[name] > 0 for name in SPEEDS)
        assert each["memory_bytes_per_s"] == 7e9
        # A step of one sequence reads all weights, and the keys and values of 7 or 8 tokens.
        step_bytes = each["decode_1_bytes_per_s"] / each["decode_1_tokens_per_s"]
        assert step_bytes > 4 * record["parameters"] * 0.9
    assert set(record["best_threads"].values()) <= {1, 2, 3}
    assert "num_threads" not in record["settings"]
    assert (record["benchmark"], record["batch_size"]) == ("threads", 2)


def test_a_batch_that_does_not_run_in_one_step_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    assert "--batch-size is 33" in refused(capsys, "threads", tiny_model, "--batch-size 33")
