"""`nanovllm train`: train or fine-tune a model on text."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm.hub import resolve_model
from nanovllm.training.config import TrainingConfig, read_toml
from nanovllm.training.run_files import Evaluation
from nanovllm.training.trainer import Trainer


def run(parsed: argparse.Namespace) -> int:
    """Train, and print each evaluation and how the run ended."""
    given = {name: value for name, value in vars(parsed).items() if name != "run"}
    file = given.pop("config", None)
    settings = {**({} if file is None else read_toml(Path(file))), **given}
    folder = settings.pop("resume", None)
    if folder is not None:
        settings.pop("output", None)
        trainer = Trainer.resume(folder, **settings)
    else:
        trainer = Trainer(TrainingConfig.from_dict(_with_folders(settings), file or "train"))
    try:
        _describe(trainer)
        result = trainer.train(_print_evaluation)
    finally:
        trainer.close()
    print(f"{result.state}: {result.message}")
    if result.best_val_loss is not None:
        print(f"best validation loss {result.best_val_loss:.4f} at step {result.best_step}")
    print(f"report: {result.folder / 'report.html'}\nserve:  nanovllm serve {result.folder}")
    return 0 if result.state == "finished" or trainer.config.stop_after else 130


def _with_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace names of models by their folders, which are fetched where they are not here yet."""
    if isinstance(settings.get("init_from"), str):
        settings["init_from"] = str(resolve_model(settings["init_from"]))
    uses_gpt2 = settings.get("tokenizer") == "gpt2" or (
        "preset" in settings and "tokenizer" not in settings
    )
    if uses_gpt2:
        settings["tokenizer"] = str(resolve_model("gpt2"))
    return settings


def _describe(trainer: Trainer) -> None:
    setup, config = trainer.setup, trainer.config
    model = setup.model
    print(
        f"{model.num_parameters:,} parameters: {model.layers} layers, {model.heads} heads, "
        f"width {model.d_model}, context {setup.context}, vocabulary {model.vocab:,}"
    )
    per_step = config.batch_size * config.grad_accumulation * setup.context
    print(
        f"{len(setup.train.tokens):,} training and {len(setup.validation.tokens):,} validation "
        f"tokens; {trainer.steps:,} steps of {per_step:,} tokens"
    )


def _print_evaluation(evaluation: Evaluation, _sample: str | None) -> None:
    """Print an evaluation as a line above the progress bar."""
    parts = [f"step {evaluation.step:>6}"]
    if evaluation.train_loss is not None:
        parts.append(f"train {evaluation.train_loss:.4f}")
    parts.append(f"validation {evaluation.val_loss:.4f}")
    if evaluation.tokens_per_s is not None:
        parts.append(f"{evaluation.tokens_per_s:,.0f} tokens/s")
    tqdm.write("  ".join(parts))
