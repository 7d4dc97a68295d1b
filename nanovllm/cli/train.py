"""`nanovllm train`: train or fine-tune a model on text."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.parser import set_up
from nanovllm.errors import TrainingError, printable

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
_OPTIONS: dict[str, tuple[tuple[str, type, str | None, str], ...]] = {
    "run": (
        ("--data", list, "PATH",
         "text files, folders of them, or one token file (.npy, or .bin of uint16)"),
        ("--validation-data", list, "PATH",
         "text or a token file to validate on (default: the end of --data)"),
        ("--output", str, "DIR", "new or empty folder for checkpoint, metrics and report"),
        ("--pattern", str, "GLOB",
         ("files to read from folders, but not from hidden ones, node_modules or virtual "
          "environments (default: *.txt)")),
        ("--config", str, "FILE", "TOML file with any of these settings"),
        ("--resume", str, "DIR", "continue the run in DIR, to the same bits"),
        ("--stop-after", int, "STEP", "save and end after this step"),
        ("--seed", int, None, "seed of weights, data order and dropout (default: 0)"),
        ("--backend", str, "NAME",
         "numba: compiled kernels; numpy: the readable operations (default: numba)"),
        ("--num-threads", int, "THREADS",
         "threads of the kernels and of NumPy (default: all usable physical cores)"),
    ),
    "model": (
        ("--layers", int, None, "transformer blocks (default: 4)"),
        ("--heads", int, None, "attention heads (default: 4)"),
        ("--width", int, None, "width of the residual stream (default: 128)"),
        ("--context", int, "TOKENS", "context length (default: 64, with --init-from the model's)"),
        ("--activation", str, "NAME",
         ("gelu_new, gelu, quick_gelu, relu, silu, tanh, mish or another of "
          "docs/reference/training.md (default: gelu_new)")),
        ("--positions", str, "KIND",
         "position embedding, learned or sinusoidal (default: learned)"),
        ("--preset", str, "NAME", "sizes of gpt2, gpt2-medium, gpt2-large or gpt2-xl"),
        ("--init-from", str, "MODEL", "fine-tune this model: a folder, or a name such as gpt2"),
        ("--tokenizer", str, "KIND",
         "char, bpe (trained on the data), gpt2, or a folder or tokenizer.json (default: bpe)"),
        ("--vocab-size", int, "TOKENS",
         "vocabulary of a bpe tokenizer (default: 1024, or what a small text gives)"),
    ),
    "optimization": (
        ("--batch-size", int, "SEQS", "sequences per batch (default: 12)"),
        ("--grad-accumulation", int, "BATCHES", "batches per update (default: 1)"),
        ("--steps", int, None, "updates (default: 2000)"),
        ("--epochs", int, None, "passes over the data, instead of --steps"),
        ("--lr", float, None, "peak learning rate (default: 1e-3, fine-tuning 1e-4)"),
        ("--min-lr", float, None, "final learning rate (default: a tenth of --lr)"),
        ("--warmup-steps", int, "STEPS",
         "updates to reach --lr (default: a twentieth of the steps, at most 100)"),
        ("--weight-decay", float, None, "AdamW's decay of matrices (default: 0.1)"),
        ("--grad-clip", float, None, "maximum gradient norm, 0 for none (default: 1)"),
        ("--beta1", float, None, "AdamW's first decay rate (default: 0.9)"),
        ("--beta2", float, None, "AdamW's second decay rate (default: 0.99)"),
        ("--dropout", float, None, "dropout rate (default: 0)"),
    ),
    "evaluation": (
        ("--eval-every", int, "STEPS",
         "updates between evaluations (default: a tenth of the steps)"),
        ("--max-eval-batches", int, "BATCHES",
         "batches of an evaluation (default: the whole validation split)"),
        ("--patience", int, "EVALS",
         "end after this many evaluations without a lower validation loss"),
        ("--validation-fraction", float, "F",
         "part of the text, at its end, that is held out (default: 0.1)"),
        ("--sample-tokens", int, "TOKENS", "tokens to generate at each evaluation (default: 100)"),
    ),
}  # fmt: skip
"""Flag, type, metavar and help of the options of each group."""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options; one that is left out has no attribute."""
    set_up(
        parser,
        run,
        arguments="--data PATH... --output DIR [options]",
        description=_DESCRIPTION,
        variables=("NANOVLLM_CACHE_DIR",),
    )
    parser.set_defaults(parser=parser)  # for errors that the settings have together
    for title, options in _OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, kind, metavar, text in options:
            value: dict[str, Any] = {"nargs": "+"} if kind is list else {"type": kind}
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text, **value)


def run(parsed: argparse.Namespace) -> int:
    """Train, and print each evaluation and how the run ended."""
    with ended_by_interrupts():
        from nanovllm.training.commands import model_argument, quoted
        from nanovllm.training.config import TrainingConfigError, read_toml
        from nanovllm.training.report import load_run
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
    overfitting = load_run(result.folder).overfitting
    if overfitting:
        print(overfitting)
    print(f"report: {quoted(result.folder / 'report.html')}")
    print(f"serve:  nanovllm serve {model_argument(result.folder)}")
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


def _describe(trainer: Trainer) -> None:
    from nanovllm.training.commands import model_argument

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
    from tqdm import tqdm

    parts = [f"step {evaluation.step:>6}"]
    for name, loss in (("train", evaluation.train_loss), ("validation", evaluation.val_loss)):
        if loss is not None:
            parts.append(f"{name} {loss:.4f}")
    if evaluation.tokens_per_s is not None:
        parts.append(f"{evaluation.tokens_per_s:,.0f} tokens/s")
    tqdm.write("  ".join(parts))
    sys.stdout.flush()  # a log shows the line at once
