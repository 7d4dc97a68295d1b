"""Numbers, durations and commands for people."""

from pathlib import Path

import pytest

from nanovllm.training.report.formatting import (
    MISSING,
    format_compact,
    format_duration,
    format_loss,
    format_number,
    format_perplexity,
    quote_folder,
    quote_path,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING), (0, "0"), (9_999, "9,999"), (12_345, "12.3k"), (999_960, "1.00M"),
        (124_439_808, "124M"), (2.05e9, "2.05B"), (3e15, "3000T"),
    ],
)  # fmt: skip
def test_compact_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert format_compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, MISSING), (-1, MISSING), (0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"),
        (75, "1 min 15 s"), (3599.7, "1 h 00 min"), (7500, "2 h 05 min"), (400_000, "4 d 15 h"),
    ],
)  # fmt: skip
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-5, "3e-5"),
        (0.001, "0.001"),
        (21_400.4, "21,400"),
        (1.23456789, "1.2346"),
        (1e20, "1e20"),
    ],
)
def test_numbers_have_five_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_losses_and_perplexities_stay_short() -> None:
    assert [format_loss(value) for value in (1.62341, 1e6)] == ["1.6234", "1,000,000"]
    assert [format_perplexity(value) for value in (None, 1.0, 12.0, 1e9)] == [
        MISSING, "2.72", "163k", MISSING
    ]  # fmt: skip


def test_a_path_with_spaces_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quote_path(Path("runs/small")) == str(Path("runs/small"))
    path = Path("my runs")
    monkeypatch.setattr("nanovllm.training.report.formatting.os.name", "posix")
    assert quote_path(path) == "'my runs'"
    monkeypatch.setattr("nanovllm.training.report.formatting.os.name", "nt")
    assert quote_path(path) == '"my runs"'


@pytest.mark.parametrize(
    ("folder", "shown"),
    [("tiny-books", "./tiny-books"), ("runs/a", "runs/a"), ("../a", "../a"), (".", ".")],
)
def test_a_bare_folder_is_no_name_of_a_model(folder: str, shown: str) -> None:
    assert quote_folder(Path(folder)) == quote_path(shown)
