"""Faults of training runs: one clear error, and the last checkpoint is kept."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nanovllm import trainer as trainer_module
from nanovllm.errors import TrainingError
from nanovllm.trainer import Trainer
from nanovllm.training.resume import load_metadata
from nanovllm.training.run.checkpoint import RESUME_FILE
from tests.support.training_runs import TEXT, assert_same_weights, config, train


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with (
        np.errstate(all="ignore"),
        pytest.raises(
            TrainingError,
            match=r"loss is [\w.+]{3,9} .* at step \d+: lower the learning rate .*"
            r"clip gradients \(--grad-clip 1\) in a new run with another --output",
        ),
    ):
        train(text, folder, lr=1e30, grad_clip=0.0, warmup_steps=0, eval_every=100)
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"
    for name, array in load_file(folder / "model.safetensors").items():
        assert np.isfinite(array).all(), name


def test_advice_after_a_loss_that_is_not_finite_names_no_setting_in_use(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "batch_loss", lambda *_, **__: 1e300 * 1e300)
    with pytest.raises(TrainingError, match="validation loss is inf at step 0") as raised:
        train(text, tmp_path / "run")
    assert "lower the learning rate (--lr) or lengthen the warmup" in str(raised.value)
    assert "clip" not in str(raised.value)


def test_epochs_give_too_few_steps_for_the_warmup(text: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"warmup_steps is 999 but must be below the \d+ steps"):
        Trainer(config(text, tmp_path / "run", steps=None, epochs=1, warmup_steps=999))


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(text, folder, stop_after=4)
    before = (folder / RESUME_FILE).read_bytes()

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanovllm.training.run.checkpoint.save_file", no_room)
    with pytest.raises(TrainingError, match=r"cannot be written.*No space left.*is kept"):
        Trainer.resume(folder).train()
    monkeypatch.undo()
    assert (folder / RESUME_FILE).read_bytes() == before
    Trainer.resume(folder).train()
    train(text, tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", folder)


def test_a_second_run_does_not_overwrite_the_first(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(text, folder, steps=1, warmup_steps=0)
    with pytest.raises(TrainingError, match=r"holds a run already.*--resume"):
        Trainer(config(text, folder))
    with pytest.raises(TrainingError, match="is a file"):
        Trainer(config(text, text))


def test_a_folder_with_other_files_is_no_output(text: Path, tmp_path: Path) -> None:
    """Only an empty folder is, or that of a run which was killed before it saved a state."""
    names = (".lock", ".lock-owner", "last/config.json", "last/tokenizer.json")
    unfinished = tmp_path / "unfinished"
    for name in names:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).touch()
    Trainer(config(text, unfinished)).close()
    (unfinished / "last" / "model.safetensors").touch()
    with pytest.raises(TrainingError, match="is not empty and holds no run: it has last;"):
        Trainer(config(text, unfinished))
    other = tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(("notes.md", "last", "a.txt", "config.json"), start=1):
        (other / name).touch()
        with pytest.raises(TrainingError, match=r"it has .*; choose a new folder \(--output\)"):
            Trainer(config(text, other))
        assert len(list(other.iterdir())) == number
    with pytest.raises(TrainingError, match=r"it has a\.txt, config\.json, last and 1 more;"):
        Trainer(config(text, other))
    with pytest.raises(TrainingError, match=r"it has other, text\.txt, unfinished;"):
        Trainer(config(text, tmp_path))


def test_an_output_with_dots_creates_no_other_folder(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.md").touch()
    with pytest.raises(TrainingError, match=r"is not empty and holds no run: it has notes\.md"):
        Trainer(config(text, tmp_path / "new" / ".." / "other"))
    with Trainer(config(text, tmp_path / "new" / ".." / "run", stop_after=1)) as trainer:
        trainer.train()
        assert trainer.folder == tmp_path / "run"
    assert not (tmp_path / "new").exists()
    assert [path.name for path in other.iterdir()] == ["notes.md"]


@pytest.mark.parametrize(
    "change", [{"step": "4"}, {"updates": -1}, {"seconds": math.inf}, {"x": 1}]
)
def test_damaged_counters_are_refused(text: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    train(text, folder, stop_after=2)
    state = load_metadata(folder)
    state["counters"] |= change
    arrays = load_file(folder / RESUME_FILE)
    save_file(arrays, folder / RESUME_FILE, metadata={"state": json.dumps(state)})
    with pytest.raises(TrainingError, match=r"resume\.safetensors is damaged: it has no counters"):
        Trainer.resume(folder)


def test_too_little_memory_is_a_message(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(trainer_module, "batch_loss", fail)
    with pytest.raises(TrainingError, match=r"memory ran out at step 0: lower --context"):
        train(text, tmp_path / "run")


def test_resuming_with_other_data_or_settings_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(text, folder, stop_after=4)
    with pytest.raises(
        TrainingError, match=r"lr is 0\.01 in the run in .* cannot change when it is resumed"
    ):
        Trainer.resume(folder, lr=1.0)
    text.write_text(TEXT.replace("sea", "see"), encoding="utf-8")
    with pytest.raises(TrainingError, match="the data is not that of the run"):
        Trainer.resume(folder)
    with pytest.raises(TrainingError, match=r"has no resume\.safetensors"):
        Trainer.resume(tmp_path / "nothing")
