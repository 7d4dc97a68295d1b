"""Trainer: the training loop, with names of models resolved to folders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from nanovllm.errors import ModelNotFoundError
from nanovllm.hub import resolve_model
from nanovllm.training import trainer
from nanovllm.training.config import TrainingConfig

_GPT2 = "gpt2"  # as a tokenizer; any other is a kind or a path


class Trainer(trainer.Trainer):
    """Trains one network, from scratch or from a model by folder, name ("gpt2") or repository.

    >>> config = TrainingConfig(data="shakespeare.txt", output="run")
    >>> Trainer(config).train()

    As a context manager it ends its threads. Several trainers may exist, in any thread; Ctrl-C
    is handled in the main thread only.

    Raises:
        TrainingError: a setting or the data cannot be used, or `output` holds a run already.
        CheckpointError: `init_from` is no GPT-2 checkpoint.
        ModelNotFoundError: there is no model of that name.
    """

    def __init__(self, config: TrainingConfig, *, resume: bool = False) -> None:
        if not resume:  # a run's own settings have the folders
            config = config.resolved()
            names = {"init_from": config.init_from, "tokenizer": config.tokenizer}
            config = replace(config, **_with_folders(names))
        super().__init__(config, resume=resume)

    @classmethod
    def resume(cls, folder: str | Path, **changes: Any) -> Self:
        """Return a trainer that continues the run in `folder`.

        Args:
            folder: output folder of a run that was stopped or killed.
            changes: settings to change; only those that change no update may be.
        """
        return super().resume(folder, **_with_folders(changes))


def _with_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace names of models by their folders, which are downloaded where necessary."""
    folders = {}
    if isinstance(settings.get("init_from"), str):
        folders["init_from"] = str(resolve_model(settings["init_from"]))
    if settings.get("tokenizer") == _GPT2:
        try:
            folders["tokenizer"] = str(resolve_model(_GPT2))
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"the tokenizer gpt2 is missing: {error}; or train one (--tokenizer bpe)"
            ) from None
    return {**settings, **folders}
