"""`nanovllm train-report`."""

from pathlib import Path

import pytest

from nanovllm.cli.main import main
from tests.support.training_runs import metrics, write_run


def test_one_run_gets_its_report_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "small", metrics([0, 20]))
    assert main(["train-report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert "<h1>small</h1>" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", [["a", "b", "./a"], ["."]])
def test_several_runs_are_compared_in_one_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, metrics([0, 20]))
    (tmp_path / "empty").mkdir()
    assert main(["train-report", *form]) == 0
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert main(["train-report", *form, "--output", "other.html"]) == 0
    assert (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "nowhere does not exist; name the output folder of a `nanovllm train` run"),
        (["empty"], "empty has neither metrics.jsonl nor run.json"),
        (["run", "--output", "empty"], "--output empty is a folder; name a file"),
        (["run", "--output", "no/report.html"], "there is no folder no"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", metrics([0]))
    assert main(["train-report", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("nanovllm: ")
    assert error in message
    assert message.count("\n") == 1
