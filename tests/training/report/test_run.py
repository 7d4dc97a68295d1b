"""Reading a run's folder, whatever a killed process left there."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.metrics import Evaluation, Sample
from nanovllm.training.report import read_run, render_report
from tests.support.training_runs import INFO, metrics, write_run


def test_a_run_has_its_evaluations_and_samples(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "small", metrics([0, 20]), [{"step": 20, "text": "Hi"}]))
    assert run.name == "small"
    assert run.evaluations[1] == Evaluation(20, 2.9, 3.0, 1e-3, 1.5, 1000.0, 2.0, 2000.0)
    assert run.samples == (Sample(20, "Hi"),)
    assert (run.state, run.step, run.total_steps, run.notices) == ("finished", 20, 40, ())
    assert run.best == run.evaluations[1]
    assert run.bits_per_byte == pytest.approx(3.0 / 0.693147 * 0.5, rel=1e-5)


def test_a_line_that_is_cut_off_is_ignored(tmp_path: Path) -> None:
    folder = write_run(tmp_path, metrics([0, 10]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "train_lo')
    run = read_run(folder)
    assert (run.step, run.notices) == (10, ())


def test_a_whole_last_line_needs_no_line_break(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 7, "val_loss": 2.5}')
    assert read_run(folder).evaluations == (Evaluation(7, val_loss=2.5),)


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    lines = ["[1]", "{}", '{"step": -1}', '{"step": true}', "nonsense", "[" * 100_000]
    lines += ['{"step": 3}', '{"step": 3}\n']
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\0\n")
    run = read_run(folder)
    assert [one.step for one in run.evaluations] == [3]
    assert run.notices == ("metrics.jsonl: 8 lines could not be read.",)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "3.0", True, [], 10**400])
def test_a_value_that_is_no_finite_number_is_missing(tmp_path: Path, value: Any) -> None:
    run = read_run(write_run(tmp_path, metrics([0, 10], val_loss=value)))
    assert [one.val_loss for one in run.evaluations] == [None, None]
    assert run.best is None
    assert render_report([run]).endswith("</html>\n")


def test_the_best_loss_of_run_json_counts_where_metrics_are_lost(tmp_path: Path) -> None:
    info = {**INFO, "best_step": 5, "best_val_loss": 0.5}
    run = read_run(write_run(tmp_path, metrics([0, 10]), info=info))
    assert run.best == Evaluation(5, val_loss=0.5)


def test_a_run_may_be_past_its_last_evaluation(tmp_path: Path) -> None:
    info = {**INFO, "step": 15, "state": "stopped"}
    run = read_run(write_run(tmp_path, metrics([0, 10]), info=info))
    assert (run.step, run.total_steps) == (15, 40)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b" " * (5 << 20)])
def test_a_damaged_run_json_is_a_notice(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path, metrics([0]))
    (folder / "run.json").write_bytes(content)
    run = read_run(folder)
    assert run.notices == ("run.json could not be read: the settings are unknown.",)
    assert run.state == "unknown"
    assert '"state":"unknown"' in render_report([run])


@pytest.mark.parametrize(
    "info",
    [
        {"config": 3, "model": [], "data": None, "state": ["running"], "message": 4},
        {"config": {"steps": "many", "nested": {"a": [1, {"b": None}]}}, "future": {"field": [1]}},
        {"data": {"validation_tokens": 0, "validation_bytes": 0}, "best_step": "x"},
    ],
)
def test_unexpected_fields_do_no_harm(tmp_path: Path, info: dict[str, Any]) -> None:
    rows = [{**row, "future": {"field": 1}} for row in metrics([0, 10])]
    run = read_run(write_run(tmp_path, rows, [{"step": 1}, {"step": 2, "text": 3}], info=info))
    assert run.state == "unknown"
    assert render_report([run, run]).endswith("</html>\n")
    assert render_report([run]).endswith("</html>\n")


def test_a_large_file_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.training.report.run._MAX_BYTES", 1 << 20)
    samples = [{"step": step, "text": "x" * 1000} for step in range(2000)]
    run = read_run(write_run(tmp_path, samples=samples))
    size = len(json.dumps(samples[-1])) + 1
    assert run.samples[-1].step == 1999
    assert len(run.samples) == (1 << 20) // size
    assert run.notices == ("samples.jsonl: only the last 1 MiB are shown.",)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"has neither metrics\.jsonl nor run\.json") as caught:
        read_run(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(TrainingError, match="nowhere does not exist"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="file is a file; name the output folder"):
        read_run(tmp_path / "file")


def test_a_run_that_overfits_says_since_when(tmp_path: Path) -> None:
    rows = metrics([0, 10, 20, 30])
    rows[2]["val_loss"], rows[3]["val_loss"] = 3.52, 3.6  # the lowest is 3.5, at 10
    run = read_run(write_run(tmp_path / "a", rows))
    assert run.overfitting.startswith(
        "The model overfits: since step 10 the training loss fell from 3.4000 to 2.4000, but the "
        "validation loss rose from 3.5000 to 3.6000. The checkpoint is that of step 10;"
    )
    assert "The model overfits: since step 10" in render_report([run])


def test_a_run_whose_best_step_is_the_first_says_that_its_model_is_untrained(
    tmp_path: Path,
) -> None:
    rows = metrics([0, 10, 20])
    rows[0] |= {"val_loss": 2.9, "train_loss": None}  # nothing is trained at step 0
    run = read_run(write_run(tmp_path / "a", rows))
    assert run.overfitting.startswith(
        "No step improved on the untrained model: its validation loss is 2.9000, that of step 20 is"
    )
    assert read_run(write_run(tmp_path / "b", rows[:1])).overfitting == ""


@pytest.mark.parametrize(
    "changes",
    [{}, {"val_loss": 3.52}, {"val_loss": 3.6, "train_loss": 3.45}, {"val_loss": None}],
)
def test_a_run_overfits_only_if_its_losses_part(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The validation loss rises by a hundredth at least while the training loss falls."""
    rows = metrics([0, 10, 20])
    rows[2] |= changes
    assert read_run(write_run(tmp_path, rows)).overfitting == ""
    assert read_run(write_run(tmp_path / "empty", ())).overfitting == ""
