"""The training loop: it learns, stops, resumes to the same bits, and never loses a checkpoint."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from threadpoolctl import ThreadpoolController

from nanovllm import trainer as trainer_module
from nanovllm.errors import TrainingError
from nanovllm.llm import LLM
from nanovllm.model.families.registry import load_config
from nanovllm.model.machine import cpu_name
from nanovllm.sampling_params import SamplingParams
from nanovllm.trainer import Trainer
from nanovllm.training.config import TrainingConfig
from nanovllm.training.metrics import Evaluation, Update
from nanovllm.training.run.lock import lock_folder
from tests.support.training_runs import TEXT, assert_same_weights, config, lines, train, weights


def test_a_run_learns_and_its_folder_is_a_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(text, folder, steps=120, eval_every=40)
    assert (result.state, result.step) == ("finished", 120)
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 40, 80, 120]
    assert metrics[0]["val_loss"] > 2.0
    assert metrics[-1]["val_loss"] < 0.7
    assert metrics[-1]["tokens"] == 120 * 4 * 16
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 4
    for sample in samples:
        assert len(sample["prompt"]) == 8  # characters are tokens here
        assert sample["prompt"] in TEXT
        assert sample["text"].startswith(sample["prompt"])
        assert len(sample["text"]) == 8 + 6
    summary = json.loads((folder / "run.json").read_text())
    assert (summary["state"], summary["cpu"]) == ("finished", cpu_name())
    assert '"state":"finished"' in (folder / "report.html").read_text(encoding="utf-8")
    with LLM(folder, backend="numpy") as llm:
        sampling = SamplingParams(max_tokens=5, temperature=0)
        assert llm.generate("on the s", sampling)[0].outputs[0].text == "ea sh"
        assert llm.default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.9)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2, "grad_accumulation": 2}])
def test_a_resumed_run_ends_with_the_same_bits(
    text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """It stops between two evaluations, and is resumed twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(text, whole, **changes)
    assert train(text, parts, stop_after=3, **changes).state == "stopped"
    assert Trainer.resume(parts, stop_after=7).train().state == "stopped"
    assert Trainer.resume(parts).train().state == "finished"
    assert_same_weights(whole, parts)
    for name in ("step", "train_loss", "val_loss", "lr", "grad_norm", "tokens"):
        assert [line[name] for line in lines(parts / "metrics.jsonl")] == [
            line[name] for line in lines(whole / "metrics.jsonl")
        ]

    for name in ("step", "train_loss", "lr", "grad_norm"):
        assert [line[name] for line in lines(parts / "steps.jsonl")] == [
            line[name] for line in lines(whole / "steps.jsonl")
        ]


def test_every_update_of_a_short_run_is_recorded(text: Path, tmp_path: Path) -> None:
    """And a callback gets each record."""
    records: list[Update] = []
    Trainer(config(text, tmp_path / "run")).train(on_step=records.append)
    metrics, steps = (lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "steps"))
    assert [asdict(record) for record in records] == steps
    assert [line["step"] for line in steps] == list(range(12))
    assert [line["lr"] for line in steps[::4]] == [line["lr"] for line in metrics[:3]]
    assert metrics[1]["train_loss"] == pytest.approx(
        sum(line["train_loss"] for line in steps[:4]) / 4
    )
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)


def test_an_error_of_a_callback_leaves_a_run_that_can_be_resumed(
    text: Path, tmp_path: Path
) -> None:
    def fail(record: Update) -> None:
        if record.step == 5:
            raise ConnectionError("no logging service")

    with pytest.raises(ConnectionError):
        Trainer(config(text, tmp_path / "run")).train(on_step=fail)
    with Trainer.resume(tmp_path / "run") as resumed:
        assert resumed.step == 6
        resumed.train()
    train(text, tmp_path / "whole")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_the_records_of_updates_are_few(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "_MAX_UPDATES", 5)
    train(text, tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run" / "steps.jsonl")] == [0, 3, 6, 9]


def test_the_settings_in_effect_are_recorded(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming changes none of them, nor the paths of the data."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    unset = {"steps": None, "eval_every": None, "warmup_steps": None}
    trainer = Trainer(config(Path(text.name), folder, stop_after=1, **unset))
    trainer.train()
    before = json.loads((folder / "run.json").read_text())
    assert before["config"] | {
        "steps": 2000, "min_lr": 0.001, "warmup_steps": 100, "eval_every": 200,
        "vocab_size": before["model"]["vocab"], "data": ["text.txt"],
    } == before["config"]  # fmt: skip
    assert {"steps", "min_lr", "warmup_steps", "vocab_size", "weight_decay"} <= {
        *before["defaults"]
    }
    assert not {"lr", "layers", "batch_size", "data", "output"} & {*before["defaults"]}
    Trainer.resume(folder, stop_after=2).train()
    after = json.loads((folder / "run.json").read_text())
    assert after["config"] == before["config"] | {"stop_after": 2}
    text.rename(tmp_path / "moved.txt")
    Trainer.resume(folder, stop_after=3, data="moved.txt").train()
    assert json.loads((folder / "run.json").read_text())["config"]["data"] == ["moved.txt"]


def test_numpy_uses_the_threads_of_the_run(text: Path, tmp_path: Path) -> None:
    """Samples are NumPy's with any backend; afterwards, the process has its own number again."""

    def count(*_: object) -> None:
        pools = ThreadpoolController().select(user_api="blas").info()
        counts.append(max(pool["num_threads"] for pool in pools))

    counts: list[int] = []
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        Trainer(config(text, tmp_path / "run", num_threads=1, steps=4)).train(count)
        count()
    assert counts == [1, 1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == 1


def test_a_folder_in_use_leaves_the_threads_of_numpy(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(text, tmp_path / "run", num_threads=1))
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        with lock_folder(tmp_path / "run"), pytest.raises(TrainingError, match="in use"):
            trainer.train()
        pools = ThreadpoolController().select(user_api="blas").info()
        assert max(pool["num_threads"] for pool in pools) == 2


def test_lines_after_the_last_saved_state_are_dropped(text: Path, tmp_path: Path) -> None:
    """A process may be killed between writing a line and saving the state."""
    folder = tmp_path / "run"
    train(text, folder, stop_after=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "val_loss": 1.0}\n{"step": null}\n[[\n{"step": 12, "val_lo')
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "train_loss": 9.0}\n{"step": 5, "train_lo')
    Trainer.resume(folder).train()
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [0, 4, 8, 12]
    steps = lines(folder / "steps.jsonl")
    assert [line["step"] for line in steps] == list(range(12))
    assert steps[4]["train_loss"] != 9.0


def test_an_interrupt_ends_after_the_step_and_saves(text: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"

    def interrupt(evaluation: Evaluation, _sample: str | None) -> None:
        if evaluation.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = Trainer(config(text, folder)).train(interrupt)
    assert (result.state, result.step) == ("stopped", 4)
    assert "--resume" in result.message
    assert signal.getsignal(signal.SIGINT) is before
    Trainer.resume(folder).train()
    train(text, whole)
    assert_same_weights(whole, folder)


def test_patience_ends_a_run_that_no_longer_improves(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(text, folder, lr=0.0, min_lr=0.0, patience=2, steps=100, eval_every=2)
    assert (result.state, result.step, result.best_step) == ("finished", 4, 0)
    assert "no lower validation loss for 2" in result.message


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: next(losses))
    result = train(text, folder)
    assert (result.best_step, result.best_val_loss) == (4, 1.0)
    monkeypatch.undo()
    train(text, tmp_path / "short", stop_after=4)
    best = load_file(folder / "model.safetensors")
    for name, array in weights(tmp_path / "short").items():
        np.testing.assert_array_equal(best[name], array)


def test_validation_data_is_recorded_and_checked_when_resuming(text: Path, tmp_path: Path) -> None:
    folder, held_out = tmp_path / "run", tmp_path / "held-out.txt"
    held_out.write_text("sea shells", encoding="utf-8")
    train(text, folder, stop_after=4, validation_data=held_out)
    summary = json.loads((folder / "run.json").read_text())
    assert summary["config"]["validation_data"] == [str(held_out)]
    assert summary["data"]["validation_tokens"] == 10
    held_out.write_text("sea", encoding="utf-8")
    with pytest.raises(TrainingError, match="the data is not that of the run"):
        Trainer.resume(folder)
    moved = tmp_path / "moved.txt"
    moved.write_text("sea shells", encoding="utf-8")
    assert Trainer.resume(folder, validation_data=moved).train().state == "finished"


def test_a_run_that_another_process_continued_is_loaded_again(text: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    train(text, folder, stop_after=2)
    earlier = Trainer.resume(folder)
    Trainer.resume(folder, stop_after=5).train()
    assert earlier.train().state == "finished"
    train(text, whole)
    assert_same_weights(whole, folder)
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [0, 4, 8, 12]


def test_fine_tuning_starts_from_the_checkpoint_and_lowers_its_loss(
    text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    train(text, source, steps=40, eval_every=40)
    other = tmp_path / "other.txt"
    other.write_text("the shells she sells are sea shells. " * 60, encoding="utf-8")
    settings = {"data": other, "init_from": source, "steps": 30, "eval_every": 10, "lr": 3e-3}
    settings |= {"output": tmp_path / "tuned", "backend": "numpy", "batch_size": 4}
    result = Trainer(TrainingConfig.from_dict(settings)).train()
    losses = [one.val_loss for one in result.evaluations if one.val_loss is not None]
    assert losses[-1] < losses[0] - 0.2
    assert GPT2_files(tmp_path / "tuned") == GPT2_files(source)


def GPT2_files(folder: Path) -> str:  # noqa: N802
    return (folder / "config.json").read_text() + (folder / "tokenizer.json").read_text()


def test_an_epoch_is_every_window_once(text: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(text, tmp_path / "run", steps=None, epochs=3))
    windows = trainer.setup.train.windows
    assert trainer.steps == -(-3 * windows // 4)


def test_sinusoidal_positions_are_saved_and_stay(text: Path, tmp_path: Path) -> None:
    """Also when the run is resumed, and when its checkpoint is fine-tuned."""
    folder = tmp_path / "run"
    train(text, folder, positions="sinusoidal", stop_after=4)
    with Trainer.resume(folder) as resumed:
        resumed.train()
    assert load_config(folder).positions == "sinusoidal"
    settings = TrainingConfig(
        data=text, init_from=folder, output=tmp_path / "tuned", steps=3, lr=1e-2, backend="numpy"
    )
    with Trainer(settings) as tuned:
        tuned.train()
    with Trainer(config(text, tmp_path / "new", positions="sinusoidal")) as new:
        expected = new.setup.parameters.arrays()["wpe.weight"]
    for name in ("run", "tuned"):
        np.testing.assert_array_equal(weights(tmp_path / name)["transformer.wpe.weight"], expected)
    run = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert run["config"]["positions"] == "sinusoidal"
    assert GPT2_files(tmp_path / "tuned") == GPT2_files(folder)
