"""`nanovllm train`: train or fine-tune a model on text."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm.cli.argument_types import print_message
from nanovllm.errors import TrainingError, printable
from nanovllm.trainer import Trainer
from nanovllm.training.commands import model_argument, quoted
from nanovllm.training.config import TrainingConfig, TrainingConfigError, read_toml
from nanovllm.training.metrics import Evaluation
from nanovllm.training.report import read_run


def run(parsed: argparse.Namespace) -> int:
    """Train, and print each evaluation and how the run ended."""
    given = {name: value for name, value in vars(parsed).items() if name not in {"run", "parser"}}
    file = given.pop("config", None)
    settings = {**({} if file is None else read_toml(Path(file))), **given}
    try:
        trainer = _make_trainer(settings, file or "the command line")
    except TrainingConfigError as error:
        parsed.parser.error("\n".join(map(printable, str(error).split("\n"))))
    with trainer:
        _describe(trainer)
        result = trainer.train(_print_evaluation)
    print(f"{result.state}: {result.message}")
    if result.best_val_loss is not None:
        print(f"best validation loss {result.best_val_loss:.4f} at step {result.best_step}")
    overfitting = read_run(result.folder).overfitting
    if overfitting:
        print(overfitting)
    print(f"report: {quoted(result.folder / 'report.html')}")
    print(f"serve:  nanovllm serve {model_argument(result.folder)}")
    stop_after = trainer.config.stop_after
    was_interrupted = result.state == "stopped" and (stop_after or math.inf) > result.step
    return 130 if was_interrupted else 0


def _make_trainer(settings: dict[str, Any], source: str) -> Trainer:
    folder = settings.pop("resume", None)
    if folder is None:
        return Trainer(TrainingConfig.from_dict(settings, source))
    if not isinstance(folder, str):
        raise TrainingError(f"{source}: resume is {folder!r} but must be the folder of a run")
    output = settings.get("output")
    if isinstance(output, str) and Path(output).absolute() == Path(folder).absolute():
        del settings["output"]
    return Trainer.resume(folder, **settings)


def _describe(trainer: Trainer) -> None:
    setup = trainer.setup
    model = setup.model
    for notice in setup.notices:
        print_message(notice)
    files = setup.data.files
    if len(files) > 1 or any(path.is_dir() for path in trainer.config.data_paths):
        print(f"{_count(len(files), 'file')}, {_size(files)}")
    print(
        f"{model.num_parameters:,} parameters: {_count(model.layers, 'layer')}, "
        f"{_count(model.heads, 'head')}, width {model.d_model}, context {setup.context}, "
        f"vocabulary {model.vocab:,}"
    )
    print(
        f"{len(setup.train.tokens):,} training and {len(setup.validation.tokens):,} validation "
        f"tokens; {_count(trainer.steps, 'step')} of {_count(setup.tokens_per_step, 'token')}"
    )
    if trainer.resumes and trainer.is_finished:
        print(
            f"nothing to do: the run is finished, at step {trainer.step:,} of {trainer.steps:,}; "
            "to train its weights further, begin a new run with --init-from "
            f"{model_argument(trainer.folder)}"
        )
    elif trainer.resumes:
        print(f"continues at step {trainer.step:,} of {trainer.steps:,}")
    sys.stdout.flush()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _size(files: Sequence[Path]) -> str:
    num_bytes = sum(file.stat().st_size for file in files if file.exists())
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _print_evaluation(evaluation: Evaluation, _sample: str | None) -> None:
    """Print an evaluation as a line above the progress bar."""
    parts = [f"step {evaluation.step:>6}"]
    for name, loss in (("train", evaluation.train_loss), ("validation", evaluation.val_loss)):
        if loss is not None:
            parts.append(f"{name} {loss:.4f}")
    if evaluation.tokens_per_s is not None:
        parts.append(f"{evaluation.tokens_per_s:,.0f} tokens/s")
    tqdm.write("  ".join(parts))
    sys.stdout.flush()  # a log shows the line at once
