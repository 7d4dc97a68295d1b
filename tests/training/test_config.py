"""Settings of a run: defaults, presets, TOML, and clear errors."""

import os
from pathlib import Path

import pytest

from nanovllm.errors import TrainingError
from nanovllm.training.config import PRESETS, TrainingConfig, read_toml

RUN = {"data": "text.txt", "output": "run"}


def test_defaults() -> None:
    config = TrainingConfig(data="text.txt", output="run").resolved()
    assert config.data == ("text.txt",)
    assert (config.layers, config.heads, config.width, config.context) == (4, 4, 128, 64)
    assert (config.tokenizer, config.vocab_size, config.lr) == ("bpe", None, 1e-3)


def test_a_preset_gives_sizes_and_tokenizer_which_flags_change() -> None:
    config = TrainingConfig.from_dict({**RUN, "preset": "gpt2-medium", "context": 256}).resolved()
    assert (config.layers, config.heads, config.width) == (24, 16, 1024)
    assert (config.context, config.tokenizer, config.vocab_size) == (256, "gpt2", None)
    assert set(PRESETS) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}


def test_fine_tuning_takes_the_sizes_of_the_checkpoint_and_a_smaller_learning_rate() -> None:
    config = TrainingConfig.from_dict({**RUN, "init_from": "folder"}).resolved()
    assert (config.layers, config.tokenizer, config.context, config.lr) == (None, None, None, 1e-4)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(TrainingError) as raised:
        TrainingConfig(
            layers=0,
            width=10,
            heads=3,
            dropout=1.0,
            lr=-1.0,
            seed=-1,
            preset="gpt5",
            positions="rotary",
            backend="torch",
            activation="swoosh",
            steps=5,
            epochs=1,
            batch_size=True,
            pattern="",
            tokenizer="a\0b",
            validation_data=[""],
            validation_fraction=0.2,
        )
    message = str(raised.value)
    for part in (
        "data is missing: text files, folders or a token file (--data)",
        "output is missing: a new folder for the run (--output)",
        "width is 10, which 3 heads do not divide",
        "layers is 0 but must be an integer, from 1 to 1024",
        "dropout is 1.0 but must be a number, at least 0 and below 1",
        "lr is -1.0",
        "seed is -1",
        "preset is 'gpt5' but must be one of gpt2, gpt2-medium, gpt2-large, gpt2-xl",
        "positions is 'rotary'",
        "backend is 'torch'",
        "activation is 'swoosh'",
        "steps and epochs are both given",
        "batch_size is True",
        "pattern is '' but must be text",
        "tokenizer is 'a\\x00b'",
        "validation_data is [''] but must be paths",
    ):
        assert part in message
    with pytest.raises(TrainingError, match="validation_data and validation_fraction are both"):
        TrainingConfig(data="b", output="c", validation_data="a.txt", validation_fraction=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0 but must be an integer, from 1"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps is 10 but must be below the 10 steps"),
        ({"warmup_steps": 2000}, "must be below the 2,000 steps of the run"),
        ({"schedule": "linear"}, "schedule is 'linear' but must be one of cosine, constant, wsd"),
        ({"schedule": "constant", "min_lr": 0.0}, "min_lr is given, but the constant schedule"),
        ({"decay_steps": 5}, "decay_steps is given, but the schedule is cosine; choose wsd"),
        (
            {"schedule": "wsd", "steps": 9, "warmup_steps": 5, "decay_steps": 5},
            "decay_steps is 5, which with 5 warmup_steps are more than the 9 steps",
        ),
        ({"steps": 10, "stop_after": 11}, "stop_after is 11 but must be at most the 10 steps"),
        ({"heads": 3}, "width is 128, which 3 heads do not divide"),
        ({"preset": "gpt2", "width": 100}, "width is 100, which 12 heads do not divide"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0 .*, above 0 and below 1"),
        ({"lr": float("inf")}, "lr is inf but must be a number, at least 0"),
        ({"min_lr": 0.1}, "min_lr is 0.1 but must be at most lr, 0.001"),
        ({"layers": 0, "lr": 1.0, "min_lr": 2.0}, "min_lr is 2.0 but must be at most lr, 1.0"),
    ],
)
def test_settings_that_cannot_go_together_are_named(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainingConfig.from_dict({**RUN, **settings})
    TrainingConfig.from_dict({**RUN, "steps": 10, "warmup_steps": 9, "stop_after": 10})


@pytest.mark.parametrize("name", ["layers", "width", "vocab_size"])
def test_sizes_cannot_be_given_beside_a_checkpoint(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name} is given, but init_from has one"):
        TrainingConfig.from_dict({**RUN, "init_from": "folder", name: 8})


def test_a_toml_file_has_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('data = ["a.txt", "b.txt"]\nbatch-size = 3\nlr = 2e-4\npreset = "gpt2"\n')
    config = TrainingConfig.from_dict({**read_toml(path), "output": "run"})
    assert (config.data, config.batch_size, config.lr) == (("a.txt", "b.txt"), 3, 2e-4)
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("text", ["layers = ", "\x00", "layers = " + "[" * 10_000])
def test_a_damaged_toml_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"run\.toml cannot be read"):
        read_toml(path)
    with pytest.raises(TrainingError, match=r"missing\.toml"):
        read_toml(tmp_path / "missing.toml")
    with pytest.raises(TrainingError, match="not a regular file"):
        read_toml(Path(os.devnull))


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(TrainingError, match=r"run\.toml: .* no setting 'learning_rate'; .* lr,"):
        TrainingConfig.from_dict({"learning_rate": 1.0}, "run.toml")
    with pytest.raises(TrainingError, match=r"there is no setting 'layer'; did you mean layers\?$"):
        TrainingConfig.from_dict({"layer": 1}, "run.toml")
    with pytest.raises(TrainingError, match=r"no setting 'train'; write the settings without"):
        TrainingConfig.from_dict({"train": {"layers": 1}}, "run.toml")
