"""Trainer resolves the names of models."""

from pathlib import Path

import pytest

from nanovllm import Trainer, TrainingConfig
from nanovllm.errors import ModelNotFoundError
from tests.support.checkpoints import write_tiny_model


def test_names_of_models_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_model(tmp_path / "model")
    monkeypatch.setattr("nanovllm.trainer.resolve_model", lambda name: {"gpt2": source}[name])
    text = tmp_path / "text.txt"
    text.write_text("the cat in the hall, on a wall with a bell\n" * 20, encoding="utf-8")
    sizes = {"layers": 1, "heads": 1, "width": 8}
    for name, settings in (
        ("tuned", {"init_from": "gpt2"}),
        ("new", {"tokenizer": "gpt2", **sizes}),
        ("preset", {"preset": "gpt2", **sizes}),
    ):
        config = {"data": text, "output": tmp_path / name, "backend": "numpy", "context": 16}
        config |= {"steps": 1, "sample_tokens": 0, "batch_size": 1, **settings}
        with Trainer(TrainingConfig.from_dict(config)) as trainer:
            assert str(source) in {trainer.config.init_from, trainer.config.tokenizer}
            if name == "tuned":
                trainer.train()
    with Trainer.resume(tmp_path / "tuned", init_from="gpt2") as trainer:
        assert isinstance(trainer, Trainer)


def test_without_a_connection_the_missing_tokenizer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(name: str) -> Path:
        raise ModelNotFoundError(f"{name} is not on this machine")

    monkeypatch.setattr("nanovllm.trainer.resolve_model", resolve)
    config = TrainingConfig(data="text.txt", output=tmp_path / "run", preset="gpt2")
    with pytest.raises(
        ModelNotFoundError,
        match=r"the tokenizer gpt2 is missing: gpt2 is not on .*; or train one \(--tokenizer bpe\)",
    ):
        Trainer(config)
