"""`nanovllm learn`: what a reader sees."""

from pathlib import Path

import pytest

from nanovllm.cli.main import main
from nanovllm.learn.course import STEPS
from nanovllm.learn.folder import CourseFolder

WRONG_AXIS = """
import numpy as np


def layer_norm(hidden, gain, bias, epsilon):
    print("rows", len(hidden))
    centred = hidden - hidden.mean(axis=0)
    return gain * centred / np.sqrt((centred**2).mean(axis=0) + epsilon) + bias
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, which is the current one."""
    assert main(["learn", "start", "gpt"]) == 0
    monkeypatch.chdir(here / "gpt")
    return here / "gpt"


def learn(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Return what a command prints, errors too."""
    capsys.readouterr()
    assert main(["learn", *words]) == code
    printed = capsys.readouterr()
    return printed.out + printed.err


def test_without_a_folder_the_steps_are_listed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = learn(capsys)
    assert all(step.title in text for step in STEPS)
    assert "nanovllm learn start" in text
    assert "learn start" in learn(capsys, "check", "3", code=1)


def test_a_new_folder_has_a_file_a_step_and_nothing_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {f"{step.module}.py" for step in STEPS} < {path.name for path in folder.iterdir()}
    assert learn(capsys).count("not written") == len(STEPS)
    assert "would be overwritten" in learn(capsys, "start", ".", code=1)
    assert "Nothing is written yet" in learn(capsys, "check")


def test_a_wrong_step_says_what_differs_and_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "step03_layer_norm.py").write_text(WRONG_AXIS, encoding="utf-8")
    text = " ".join(learn(capsys, "check", "3", code=1).split())
    assert "WRONG the row 1, 2, 6 on paper" in text
    assert "3 are not a number (NaN)" in text
    assert "printed: rows 1" in text
    assert "Probably: Mean and variance are taken over the tokens (axis 0)" in text
    assert "0 of 5 pass; 4 were not run. A hint: nanovllm learn hint 3" in text
    assert "written, not checked" in learn(capsys)


def test_progress_follows_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = STEPS[2]
    solution = learn(capsys, "show", "3", "--solution")
    (folder / f"{step.module}.py").write_text(solution, encoding="utf-8")
    assert "Passed." in learn(capsys, "check", "3")
    assert "1 of 12 steps passed" in learn(capsys)
    with (folder / f"{step.module}.py").open("a", encoding="utf-8") as file:
        file.write("# more\n")
    assert "changed since it passed" in learn(capsys)
    assert "Passed." in learn(capsys, "check")
    both = learn(capsys, "check", "4", "3", code=1)
    assert both.index("Step 4") < both.index("Step 3") < both.index("Passed.")
    found = CourseFolder.find(None)
    assert found is not None
    assert found.status(step) == "passed"


def test_hints_come_one_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hints = STEPS[2].hints
    for number, hint in enumerate(hints, 1):
        text = learn(capsys, "hint", "3")
        assert f"Hint {number} of {len(hints)}" in text
        assert hint in text
    assert hints[-1] in learn(capsys, "hint", "3")  # the last one again
    shown = learn(capsys, "hint", "3", "--all")
    assert all(hint in shown for hint in hints)
    assert "No hint of this step" in learn(capsys, "hint", "4", "--all")


def test_a_hint_is_about_what_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solution = learn(capsys, "show", "1", "--solution")
    wrong = solution.replace("    ids = to_bytes(text)\n    for rank", "    ids = []\n    for rank")
    (folder / "step01_tokens.py").write_text(wrong, encoding="utf-8")
    learn(capsys, "check", "1", code=1)
    assert "Hint 1 of 6 for step 1:\n\n`encode`: " in learn(capsys, "hint", "1")
    assert "Hint 2 of 6 for step 1:\n\n`to_bytes`, " in learn(capsys, "hint", "1")
    (folder / "step01_tokens.py").write_text(solution, encoding="utf-8")
    learn(capsys, "check", "1")
    assert "Hint 3 of 6 for step 1:\n\n`merge_pair`: " in learn(capsys, "hint", "1")


def test_pages_and_differences_are_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = learn(capsys, "show", "3")
    assert page.startswith("# Step 3: layer normalization")
    assert "<details>" not in page
    assert "## Answers\n\n1. It needs one pass over the row" in page
    assert "`layer_norm` (" in page
    assert "step 3 is not written yet" in learn(capsys, "diff", "3", code=1)
    (folder / "step03_layer_norm.py").write_text(WRONG_AXIS, encoding="utf-8")
    text = learn(capsys, "diff", "3")
    assert "-    centred = hidden - hidden.mean(axis=0)" in text
    assert "nanovllm.model.layers.layer_norm" in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["check", "3", "13"], "there is no step 13; the steps are 1 to 12"),
        (["check", "3", "--folder", "nowhere"], "nowhere has no course.json"),
        (["show", "0"], "there is no step 0"),
    ],
)
def test_bad_input_gets_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert text in learn(capsys, *words, code=1)


def test_a_step_has_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["learn", "check", "2", "layer_norm"])
    message = "layer_norm must be the number of a step, such as 3"
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_python_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "step03_layer_norm.py").write_text("def layer_norm(:\n", encoding="utf-8")
    assert "cannot be read as Python" in learn(capsys)
    assert "step03_layer_norm.py, line 1" in learn(capsys, "check", "3", code=1)
    (folder / "step03_layer_norm.py").unlink()
    assert "there is no" in learn(capsys, "check", "3", code=1)
    assert "Nothing is written yet" in learn(capsys, "check")
    assert not (folder / "__pycache__").exists()
    (folder / "course.json").write_text("{", encoding="utf-8")
    assert "course.json cannot be read" in learn(capsys, code=1)
