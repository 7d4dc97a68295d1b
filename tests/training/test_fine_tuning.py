"""Fine-tuning keeps what its source has; Trainer as a Python API."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from nanovllm import Trainer, TrainingConfig
from nanovllm.llm import LLM
from nanovllm.model.families.registry import load_config
from nanovllm.training.metrics import TrainingResult
from tests.support.checkpoints import write_json, write_tiny_model

TEXT = "the cat in the hall, on a wall with a bell\n" * 20


def config(folder: Path, source: Path) -> TrainingConfig:
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return TrainingConfig(
        data=text,
        output=folder / "run",
        init_from=source,
        context=16,
        batch_size=2,
        steps=2,
        stop_after=1,
        sample_tokens=2,
        backend="numpy",
    )


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_the_source_has_is_kept(tmp_path: Path, dtype: str) -> None:
    """The vocabulary is padded, the context is shorter, and the source is gone when resuming."""
    source = write_tiny_model(
        tmp_path / "model",
        dtype=dtype,
        config={"vocab_size": 300, "eos_token_id": [266, 3], "bos_token_id": 5},
    )
    write_json(source / "generation_config.json", {"temperature": 0.5, "eos_token_id": 7})
    write_json(source / "tokenizer_config.json", {"model_max_length": 128, "note": "kept"})
    before = load_config(source)
    with Trainer(config(tmp_path, source)) as trainer:
        assert any("16-bit" in one for one in trainer.setup.notices) == (dtype == "BF16")
        trainer.train()
    shutil.rmtree(source)
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.train().state == "finished"
    for folder in (tmp_path / "run", tmp_path / "run" / "last"):
        assert load_config(folder) == before
        settings = json.loads((folder / "config.json").read_text())
        assert (settings["bos_token_id"], settings["eos_token_id"]) == (5, [266, 3])
        assert settings["dtype"] == "float32"
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"temperature": 0.5, "eos_token_id": 7}
        assert json.loads((folder / "tokenizer_config.json").read_text())["note"] == "kept"
    with LLM(tmp_path / "run", backend="numpy") as llm:
        assert llm.generate("the cat")[0].outputs[0].token_ids


def test_trainers_run_one_after_another_and_in_a_thread(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    results: list[TrainingResult] = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        trainer = Trainer(config(tmp_path / name, source))
        assert repr(trainer).endswith("parameters, step 0 of 2)")
        thread = threading.Thread(target=lambda one=trainer: results.append(one.train()))
        thread.start()
        thread.join()
    first, second = results
    assert (first.state, first.step) == ("stopped", 1)
    assert first.best_val_loss == second.best_val_loss
