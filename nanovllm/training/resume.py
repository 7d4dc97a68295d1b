"""The state of a run, from which an interrupted run continues bit-identically."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.errors import TrainingError
from nanovllm.training.commands import model_argument
from nanovllm.training.config import TrainingConfig
from nanovllm.training.counters import Counters
from nanovllm.training.metrics import RUN_FILE, parse_object
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.run.checkpoint import (
    LAST,
    RESUME_FILE,
    load_counters,
    load_state,
    save_state,
)
from nanovllm.training.run.lock import check_is_idle
from nanovllm.training.setup import Setup

_CHANGEABLE = (
    "data",
    "validation_data",
    "stop_after",
    "num_threads",
    "patience",
    "sample_tokens",
    "max_eval_batches",
)
"""Settings that a resumed run may change: none of them changes an update."""
_PATHS = ("data", "validation_data")


def resumed_config(folder: Path, changes: Mapping[str, Any]) -> TrainingConfig:
    """Return the settings of the run in `folder` with these changes.

    Raises:
        TrainingError: the folder has no state, another process continues the run, or a setting that
            changes an update would change.
    """
    path = folder / RESUME_FILE
    check_is_idle(folder)  # before the data is read
    settings = load_counters(folder).get("config")
    if not isinstance(settings, dict):
        raise TrainingError(f"{path} is damaged: it has no settings")
    before = {**settings, "output": str(folder), "stop_after": None}
    saved = TrainingConfig.from_dict(before, str(path))
    config = TrainingConfig.from_dict({**before, **changes})
    fixed = [
        name
        for name in changes
        if name not in _CHANGEABLE and getattr(saved, name) != getattr(config, name)
    ]
    if fixed:
        in_effect = _in_effect(saved, folder)
        values = ", ".join(f"{name} is {in_effect[name]!r}" for name in fixed)
        raise TrainingError(
            f"{values} in the run in {folder}, and cannot change when it is resumed; leave it "
            f"out, or begin a new run with its weights (--init-from {model_argument(folder)})"
        )
    return config


def _in_effect(config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Return the settings of a run with the values that its defaults had, where they are known."""
    try:
        summary = parse_object((folder / RUN_FILE).read_bytes()) or {}
    except OSError:
        summary = {}
    settings = config.to_dict()
    steps = summary.get("steps")
    if isinstance(steps, int):
        settings |= config.schedule(steps)
    model = summary.get("model")
    for name, key in (("vocab_size", "vocab"), ("context", "context")):
        if settings[name] is None and isinstance(model, dict):
            settings[name] = model.get(key)
    return settings


def save_run(folder: Path, setup: Setup, optimizer: AdamW, counters: Counters) -> None:
    """Save the state of a run, and the last weights as a checkpoint.

    Raises:
        TrainingError: a file cannot be written.
    """
    state = {
        "counters": asdict(counters),
        "config": setup.config.absolute().to_dict(),
        "data_digest": setup.data_digest,
        "started": setup.facts["started"],
        "given_paths": {name: setup.facts["config"][name] for name in _PATHS},
    }
    save_state(folder, _arrays(setup, optimizer), state)
    setup.save_weights(folder / LAST)


def restore_run(folder: Path, setup: Setup, optimizer: AdamW) -> Counters:
    """Load the saved state into the network and the optimizer; return the counters.

    Raises:
        TrainingError: the data has changed, or the saved state is damaged.
    """
    saved = load_counters(folder)
    if saved.get("data_digest") != setup.data_digest:
        raise TrainingError(
            f"the data is not that of the run in {folder}: files, pattern or their contents have "
            "changed; restore them, or begin a new run"
        )
    load_state(folder, _arrays(setup, optimizer))
    try:
        counters = Counters(**saved["counters"])
    except (KeyError, TypeError, ValueError):
        raise TrainingError(f"{folder / RESUME_FILE} is damaged: it has no counters") from None
    optimizer.updates = counters.step
    setup.facts["started"] = saved.get("started", setup.facts["started"])
    # run.json keeps the paths as they were given, until others are given.
    for name, given in saved.get("given_paths", {}).items():
        if saved["config"][name] == setup.config.to_dict()[name]:
            setup.facts["config"][name] = given
    return counters


def is_current(folder: Path, counters: Counters) -> bool:
    """Return whether the saved state has these counters."""
    return load_counters(folder).get("counters") == asdict(counters)


def _arrays(setup: Setup, optimizer: AdamW) -> dict[str, np.ndarray]:
    return {
        "parameters": setup.parameters.values,
        "first_moment": optimizer.first_moment,
        "second_moment": optimizer.second_moment,
    }
