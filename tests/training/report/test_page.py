"""The page and its data: complete, escaped, bounded, and written at once."""

from pathlib import Path
from typing import Any

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.report import read_run, render_report, write_page, write_report
from tests.support.html_page import HtmlPage
from tests.support.training_runs import INFO, metrics, write_run

SAMPLES = [{"step": step, "text": f"text of step {step}"} for step in (0, 20)]


def page_of(folder: Path, *args: Any, **settings: Any) -> HtmlPage:
    return HtmlPage(render_report([read_run(write_run(folder, *args, **settings))]))


def run_of(folder: Path, *args: Any, **settings: Any) -> dict[str, Any]:
    (run,) = page_of(folder, *args, **settings).data["runs"]
    return dict(run)


def test_the_page_has_the_run(tmp_path: Path) -> None:
    page = page_of(tmp_path / "small", metrics([0, 20, 40]), SAMPLES)
    (run,) = page.data["runs"]
    assert page.texts["h1"] == [run["name"]] == ["small"]
    assert run["best"] == {"step": 40, "val_loss": 2.0, "tokens": 4000, "elapsed_s": 4.0}
    assert run["last"] == {"tokens": 4000, "tokens_per_s": 1000, "elapsed_s": 4.0}
    assert run["bits_per_byte"] == pytest.approx(1.4427, abs=1e-4)
    assert (run["parameters"], run["sizes"]) == (123_456, "2 layers, 32 wide")
    assert run["settings"]["Data"]["files"] == "a.txt, b.txt"
    assert run["samples"][-1] == {"step": 20, "text": "text of step 20", "prompt": ""}
    assert f"nanovllm serve {tmp_path / 'small'}" in run["commands"].values()
    assert run["evaluations"]["step"] == [0, 20, 40]
    assert run["evaluations"]["val_loss"] == [4, 3, 2]


def test_the_page_without_its_script_has_the_last_values(tmp_path: Path) -> None:
    page = page_of(tmp_path / "small", metrics([0, 20]), SAMPLES)
    assert page.texts["th"] == ["small"]
    (values,) = page.texts["td"]
    for part in ("finished", "step 20", "best validation loss 3.0000 at step 20", "bits per byte"):
        assert part in values


def test_the_page_has_the_records_of_updates(tmp_path: Path) -> None:
    updates = [
        {"step": step, "train_loss": 5.0 - step, "lr": step / 10, "grad_norm": 2.0}
        for step in (0, 1, 3, 5)
    ]
    assert run_of(tmp_path, metrics([0, 4]), updates=updates)["updates"] == {
        "step": [0, 1, 3, 5],
        "train_loss": [5, 4, 2, 0],
        "lr": [0, 0.1, 0.3, 0.5],
        "grad_norm": [2, 2, 2, 2],
    }


def test_settings_with_their_defaults_are_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, info={**INFO, "defaults": ["lr", 3]})
    assert run["defaults"] == ["lr"]
    assert run["settings"]["Training"]["lr"] == "0.001"
    assert "defaults" not in run["settings"]["Run"]


def test_a_prompt_is_the_beginning_of_its_sample(tmp_path: Path) -> None:
    samples = [{"step": 0, "text": "She <sells", "prompt": "She <"}]
    assert run_of(tmp_path / "a", metrics([0]), samples)["samples"][0]["prompt"] == "She <"
    samples[0]["prompt"] = "not its beginning"
    assert run_of(tmp_path / "b", metrics([0]), samples)["samples"][0]["prompt"] == ""


def test_a_run_without_evaluations_has_no_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, info={**INFO, "state": "running"})
    assert (run["best"], run["commands"], run["evaluations"]["step"]) == (None, {}, [])


@pytest.mark.parametrize("count", [1, 2])
def test_untrusted_text_is_escaped(tmp_path: Path, count: int) -> None:
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\0\x1b\ud800"
    info = {
        "config": {hostile: hostile, "steps": hostile},
        "model": {"parameters": hostile, "list": [hostile]},
        "state": hostile,
        "message": hostile,
        hostile: {hostile: hostile},
    }
    runs = [
        read_run(
            write_run(
                tmp_path / f"<b>{number}&",
                metrics([0, 20]),
                [{"step": 20, "text": hostile}],
                {**info, "seed": number},
            )
        )
        for number in range(count)
    ]
    text = render_report(runs)
    page = HtmlPage(text)
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert not page.all("b")
    assert "\0" not in text
    text.encode("utf-8")
    assert [run["samples"][0]["text"] for run in page.data["runs"]] == [hostile] * count


@pytest.mark.parametrize(
    ("state", "reloads"),
    [("running", True), ("finished", False), ("stopped", False), ("failed", False)],
)
def test_only_a_running_run_reloads(tmp_path: Path, state: str, reloads: bool) -> None:
    info = {**INFO, "state": state, "message": "loss is NaN"}
    page = page_of(tmp_path, metrics([0, 20]), info=info)
    (run,) = page.data["runs"]
    assert bool(page.all("meta", **{"http-equiv": "refresh"})) == reloads
    assert (page.data["silence_s"] is not None) == reloads
    assert (run["state"], run["message"]) == (state, "loss is NaN")
    assert (run["step"], run["total_steps"]) == (20, 40)
    resumes = [command for command in run["commands"].values() if "--resume" in command]
    assert bool(resumes) == (state != "finished")


def test_a_long_run_gives_a_bounded_page(tmp_path: Path) -> None:
    rows = metrics(range(5000))
    rows[1234]["val_loss"] = 77.0  # a spike is not lost
    samples = [{"step": step, "text": "x" * 10_000} for step in range(0, 5000, 50)]
    info = {**INFO, "config": {f"setting {number}": "v" * 5000 for number in range(2000)}}
    run = run_of(tmp_path, rows, samples, info)
    assert len(run["evaluations"]["val_loss"]) <= 800
    assert 77 in run["evaluations"]["val_loss"]
    assert run["num_evaluations"] == 5000
    assert len(run["samples"]) == 50
    assert max(len(sample["text"]) for sample in run["samples"]) == 4001
    write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run", metrics([0, 40]), SAMPLES) for name in ("a", "b")]
    page = HtmlPage(render_report([read_run(folder) for folder in folders]))
    assert page.texts["h1"] == ["2 runs compared"]
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    assert not page.all("meta", **{"http-equiv": "refresh"})


def test_the_message_of_a_finished_run_says_why_it_ended_early(tmp_path: Path) -> None:
    info = {**INFO, "message": "no lower loss in 5 evaluations"}
    early = run_of(tmp_path / "early", metrics([0, 20]), info=info)
    assert early["message"] == info["message"]
    assert run_of(tmp_path, metrics([0, 40]), info=info)["message"] == ""


@pytest.mark.parametrize("count", [0, 25])
def test_the_number_of_runs_is_bounded(tmp_path: Path, count: int) -> None:
    run = read_run(write_run(tmp_path, metrics([0])))
    with pytest.raises(TrainingError, match=f"1 to 24 runs, not {count}"):
        render_report([run] * count)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_run(tmp_path, metrics([0]))
    write_report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_page("\ud800", tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl", "report.html", "run.json"
    ]  # fmt: skip
