"""The saved state of a run, from which an interrupted run continues bit-identically.

It is one file, resume.safetensors, so parameters, moments and counters always belong together. Its
metadata is JSON: the counters, the settings, and a digest of the data.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nanovllm.errors import TrainingError
from nanovllm.training.commands import model_argument
from nanovllm.training.config import TrainingConfig
from nanovllm.training.counters import Counters
from nanovllm.training.metrics import RUN_FILE, parse_object
from nanovllm.training.network.optimizer import AdamW
from nanovllm.training.network.schedule import Schedule
from nanovllm.training.run.checkpoint import LAST, RESUME_FILE, save_tensors
from nanovllm.training.run.lock import check_is_idle
from nanovllm.training.setup import Setup

_PATHS = ("data", "validation_data")
_LENGTHS = {"steps", "epochs"}  # of which a run has one
_SCHEDULE = _LENGTHS | {"schedule", "min_lr", "warmup_steps", "decay_steps"}
"""Settings that a resumed run may change, if the updates so far had the same learning rates."""
_CHANGEABLE = {
    *_PATHS, *_SCHEDULE, "stop_after", "num_threads", "patience", "sample_tokens",
    "max_eval_batches", "eval_every",
}  # fmt: skip
"""Settings that a resumed run may change: none of them changes an update that was made."""


def resumed_config(folder: Path, changes: Mapping[str, Any]) -> TrainingConfig:
    """Return the settings of the run in `folder` with these changes.

    Raises:
        TrainingError: the folder has no state, another process continues the run, or a setting that
            changes an update would change.
    """
    path = folder / RESUME_FILE
    check_is_idle(folder)  # before the data is read
    metadata = load_metadata(folder)
    settings = metadata.get("config")
    if not isinstance(settings, dict):
        raise TrainingError(f"{path} is damaged: it has no settings")
    before = {**settings, "output": str(folder), "stop_after": None}
    saved = TrainingConfig.from_dict(before, str(path))
    if _LENGTHS & changes.keys():
        before |= dict.fromkeys(_LENGTHS - changes.keys())
    schedule = _saved_schedule(folder, metadata)
    if schedule is not None and _SCHEDULE & changes.keys():  # the default depends on the steps
        before["warmup_steps"] = schedule.warmup_steps
    config = TrainingConfig.from_dict({**before, **changes})
    changeable = _CHANGEABLE if schedule is not None else _CHANGEABLE - _SCHEDULE
    fixed = [
        name
        for name in changes
        if name not in changeable and getattr(saved, name) != getattr(config, name)
    ]
    if fixed:
        in_effect = saved.to_dict() | _recorded_settings(folder)
        values = ", ".join(f"{name} is {in_effect[name]!r}" for name in fixed)
        raise TrainingError(
            f"{values} in the run in {folder}, and cannot change when it is resumed; leave it "
            f"out, or begin a new run with its weights (--init-from {model_argument(folder)})"
        )
    return config


def _saved_schedule(folder: Path, metadata: Mapping[str, Any]) -> Schedule | None:
    """Return the schedule of a saved run; None in a state that was saved without one."""
    if "schedule" not in metadata:
        return None
    try:
        return Schedule(**metadata["schedule"])
    except TypeError as error:
        raise TrainingError(f"{folder / RESUME_FILE} is damaged: {error}") from None


def _check_past(folder: Path, before: Schedule | None, setup: Setup, step: int) -> None:
    """Raise TrainingError if the settings would have changed one of the updates so far."""
    schedule = setup.schedule
    if schedule.steps < step:
        raise TrainingError(
            f"steps is {schedule.steps:,}, but the run in {folder} has made {step:,} updates"
        )
    first = None if before is None else schedule.first_difference(before, step)
    if before is not None and first is not None:
        raise TrainingError(
            f"the {schedule.kind} schedule of {schedule.steps:,} steps gives update {first:,} the "
            f"learning rate {schedule.learning_rate(first):.6g}, but the run in {folder} made it "
            f"with {before.learning_rate(first):.6g}, and is at step {step:,}. A resumed run may "
            "change learning rates that are still to come: any number of steps with the schedules "
            "constant and wsd, until the decay of wsd begins. To train longer, begin a new run "
            f"with its weights (--init-from {model_argument(folder)})"
        )


def _recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in effect that run.json has; none if it is missing or damaged."""
    try:
        settings = (parse_object((folder / RUN_FILE).read_bytes()) or {}).get("config")
    except OSError:
        return {}
    return settings if isinstance(settings, dict) else {}


def save_run(folder: Path, setup: Setup, optimizer: AdamW, counters: Counters) -> None:
    """Save the state of a run, and the last weights as a checkpoint.

    Raises:
        TrainingError: a file cannot be written.
    """
    settings = setup.config.to_dict()
    absolute = {name: [str(Path(one).absolute()) for one in settings[name]] for name in _PATHS}
    metadata = {
        "counters": asdict(counters),
        "config": settings | absolute,
        "data_digest": setup.data_digest,
        "schedule": asdict(setup.schedule),
        "started": setup.facts["started"],
        "given_paths": {name: setup.facts["config"][name] for name in _PATHS},
    }
    save_state(folder, _arrays(setup, optimizer), metadata)
    setup.save_weights(folder / LAST)


def restore_run(folder: Path, setup: Setup, optimizer: AdamW) -> Counters:
    """Load the saved state into the network and the optimizer; return the counters.

    Raises:
        TrainingError: the data has changed, the saved state is damaged, or an update so far would
            have had another learning rate.
    """
    saved = load_metadata(folder)
    if saved.get("data_digest") != setup.data_digest:
        raise TrainingError(
            f"the data is not that of the run in {folder}: files, pattern or their contents have "
            "changed; restore them, or begin a new run"
        )
    load_arrays(folder, _arrays(setup, optimizer))
    try:
        counters = Counters(**saved["counters"])
    except (KeyError, TypeError, ValueError):
        raise TrainingError(f"{folder / RESUME_FILE} is damaged: it has no counters") from None
    _check_past(folder, _saved_schedule(folder, saved), setup, counters.step)
    optimizer.updates = counters.step
    setup.facts["started"] = saved.get("started", setup.facts["started"])
    # run.json keeps the paths as they were given, until others are given.
    for name, given in saved.get("given_paths", {}).items():
        if saved["config"][name] == setup.config.to_dict()[name]:
            setup.facts["config"][name] = given
    return counters


def is_current(folder: Path, counters: Counters) -> bool:
    """Return whether the saved state has these counters."""
    return load_metadata(folder).get("counters") == asdict(counters)


def save_state(folder: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write resume.safetensors."""
    text = json.dumps(metadata, allow_nan=False)
    save_tensors(folder / RESUME_FILE, arrays, {"state": text})


def load_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a saved state.

    Raises:
        TrainingError: the folder has no state, or the file is damaged.
    """
    with _opened(folder) as file:
        metadata = json.loads((file.metadata() or {})["state"])
        if not isinstance(metadata, dict):
            raise TypeError("its state is not an object")
        return metadata


def load_arrays(folder: Path, into: Mapping[str, np.ndarray]) -> None:
    """Copy the arrays of a saved state into those of `into`.

    Raises:
        TrainingError: an array is missing or has another size.
    """
    with _opened(folder) as file:
        for name, array in into.items():
            stored = file.get_tensor(name)
            if stored.shape != array.shape or stored.dtype != array.dtype:
                raise TrainingError(
                    f"{folder / RESUME_FILE}: {name} is {stored.dtype} {list(stored.shape)}, but "
                    f"the run's settings need {array.dtype} {list(array.shape)}"
                )
            array[...] = stored


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """Open resume.safetensors; raise TrainingError if it is missing or damaged."""
    path = folder / RESUME_FILE
    if not path.exists():
        raise TrainingError(
            f"{folder} has no {RESUME_FILE} to resume from; give the output folder of a run that "
            "was stopped, or begin a run with --data and --output"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except TrainingError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged: {error}; the run cannot be resumed") from None


def _arrays(setup: Setup, optimizer: AdamW) -> dict[str, np.ndarray]:
    return {
        "parameters": setup.parameters.values,
        "first_moment": optimizer.first_moment,
        "second_moment": optimizer.second_moment,
    }
