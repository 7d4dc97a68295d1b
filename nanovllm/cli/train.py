"""`nanovllm train`: train or fine-tune a model on text."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.checked_fields import CheckedField, checked_fields
from nanovllm.cli.argument_types import print_message
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.parser import flag_of, set_up
from nanovllm.errors import TrainingError, counted, printable

if TYPE_CHECKING:
    from nanovllm.trainer import Trainer
    from nanovllm.training.metrics import Evaluation

_DESCRIPTION = """
Train a GPT-2 from scratch, or fine-tune one, and write a Hugging Face checkpoint that
`nanovllm serve` and transformers load.

  nanovllm train --data shakespeare.txt --output run
  nanovllm train --data ~/project --pattern "*.py" --output run --layers 6 --width 384
  nanovllm train --data notes.txt --init-from gpt2 --context 256 --output run
  nanovllm train --resume run
  nanovllm serve ./run

The same settings, with underscores, may be in a TOML file (--config); the command line counts more.
Ctrl-C saves the state and ends the run.
"""
_GROUPS = {
    "data": "text", "layers": "model", "batch_size": "optimization", "eval_every": "evaluation",
    "backend": "machine",
}  # fmt: skip
"""The titles of the groups of options by their first field."""
_OTHERS = (
    ("--config", "FILE", "TOML file with any of these settings"),
    ("--resume", "DIR", "continue the run in DIR, to the same bits"),
)
_METAVARS = {
    "data": "PATH", "validation_data": "PATH", "output": "DIR", "init_from": "MODEL",
    "eval_every": "STEPS", "stop_after": "STEP",
}  # fmt: skip


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options; one that is left out has no attribute."""
    set_up(
        parser, run, "--data PATH... --output DIR [options]", _DESCRIPTION, ("NANOVLLM_CACHE_DIR",)
    )
    parser.set_defaults(parser=parser)  # for errors that the settings have together
    with ended_by_interrupts():
        from nanovllm.training.config import TrainingConfig
    for flag, metavar, text in _OTHERS:
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)
    group: argparse._ActionsContainer = parser
    for name, field in checked_fields(TrainingConfig).items():
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, **_describe(field))


def _describe(field: CheckedField) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a setting, whose text says what it is for."""
    text = re.sub(r"`(\w+)`", lambda found: flag_of(found[1]), field.summary)
    if field.default not in (None, "", ()):
        text += f" (default: {field.default})"
    takes = {"nargs": "+"} if field.default == () else {"type": field.kind or str}
    metavar = _METAVARS.get(field.name, field.name.rsplit("_", 1)[-1].upper())
    return {**takes, "metavar": metavar, "help": text}


def run(parsed: argparse.Namespace) -> int:
    """Train, and print each evaluation and how the run ended."""
    with ended_by_interrupts():
        from nanovllm.training.commands import model_argument, quoted
        from nanovllm.training.config import TrainingConfigError, read_toml
        from nanovllm.training.report import read_run
    given = {name: value for name, value in vars(parsed).items() if name not in {"run", "parser"}}
    file = given.pop("config", None)
    settings = {**({} if file is None else read_toml(Path(file))), **given}
    try:
        trainer = _make_trainer(settings, file or "the command line")
    except TrainingConfigError as error:
        parsed.parser.error("\n".join(map(printable, str(error).split("\n"))))
    except KeyboardInterrupt:
        print_message("stopped before the first step; nothing was saved")
        return 130
    with trainer:
        _introduce(trainer)
        result = trainer.train(_print_evaluation)
    print(f"{result.state}: {result.message}")
    if result.best_val_loss is not None:
        print(f"best validation loss {result.best_val_loss:.4f} at step {result.best_step}")
    overfitting = read_run(result.folder).overfitting
    if overfitting:
        print(overfitting)
    print(f"report: {quoted(result.folder / 'report.html')}")
    if trainer.setup.model.is_gpt2:
        print(f"serve:  nanovllm serve {model_argument(result.folder)}")
    else:
        print(f"GPT-2 without its {', '.join(trainer.config.ablated)} cannot be served")
    stop_after = trainer.config.stop_after
    was_interrupted = result.state == "stopped" and (stop_after or math.inf) > result.step
    return 130 if was_interrupted else 0


def _make_trainer(settings: dict[str, Any], source: str) -> Trainer:
    from nanovllm.trainer import Trainer
    from nanovllm.training.config import TrainingConfig

    folder = settings.pop("resume", None)
    if folder is None:
        return Trainer(TrainingConfig.from_dict(settings, source))
    if not isinstance(folder, str):
        raise TrainingError(f"{source}: resume is {folder!r} but must be the folder of a run")
    output = settings.get("output")
    if isinstance(output, str) and Path(output).absolute() == Path(folder).absolute():
        del settings["output"]
    return Trainer.resume(folder, **settings)


def _introduce(trainer: Trainer) -> None:
    from nanovllm.training.commands import model_argument

    setup = trainer.setup
    model = setup.model
    for notice in setup.notices:
        print_message(notice)
    files = setup.data.files
    if len(files) > 1 or any(path.is_dir() for path in trainer.config.data_paths):
        print(f"{counted(len(files), 'file')}, {_size(files)}")
    print(
        f"{model.num_parameters:,} parameters: {counted(model.layers, 'layer')}, "
        f"{counted(model.heads, 'head')}, width {model.d_model}, context {setup.context}, "
        f"vocabulary {model.vocab:,}"
    )
    print(
        f"{len(setup.train.tokens):,} training and {len(setup.validation.tokens):,} validation "
        f"tokens; {counted(trainer.steps, 'step')} of {counted(setup.tokens_per_step, 'token')}"
    )
    if setup.train.has_loss is not None:
        train, validation = setup.train.num_targets, setup.validation.num_targets
        print(f"loss on {train:,} and {validation:,} of them")
    if trainer.resumes and trainer.is_finished:
        print(
            f"nothing to do: the run is finished, at step {trainer.step:,} of {trainer.steps:,}; "
            "to train its weights further, "
            + (
                "give more --steps"
                if trainer.config.schedule == "constant"
                else f"begin a new run with --init-from {model_argument(trainer.folder)}"
            )
        )
    elif trainer.resumes:
        print(f"continues at step {trainer.step:,} of {trainer.steps:,}")
    sys.stdout.flush()


def _size(files: Sequence[Path]) -> str:
    num_bytes = sum(file.stat().st_size for file in files if file.exists())
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _print_evaluation(evaluation: Evaluation, _sample: str | None) -> None:
    """Print an evaluation as a line above the progress bar."""
    from tqdm import tqdm

    parts = [f"step {evaluation.step:>6}"]
    for name, loss in (("train", evaluation.train_loss), ("validation", evaluation.val_loss)):
        if loss is not None:
            parts.append(f"{name} {loss:.4f}")
    if evaluation.tokens_per_s is not None:
        parts.append(f"{evaluation.tokens_per_s:,.0f} tokens/s")
    tqdm.write("  ".join(parts))
    sys.stdout.flush()  # a log shows the line at once
