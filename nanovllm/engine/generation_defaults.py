"""Sampling defaults of a model, from its generation_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.model.config import load_generation_config
from nanovllm.sampling_params import MODEL_DEFAULTS, SamplingParams

SamplingDefaults: TypeAlias = Mapping[str, Any]
"""Settings of SamplingParams by name, of those in MODEL_DEFAULTS."""


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Return the sampling defaults of a model folder; empty if it has none.

    Null settings are omitted. Raises CheckpointError if a setting is invalid, because every request
    that uses the default would fail.
    """
    config: Mapping[str, Any] = load_generation_config(folder)
    defaults = {name: config[name] for name in MODEL_DEFAULTS if config.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        path = folder / "generation_config.json"
        raise CheckpointError(f"{path} is invalid: {error}; correct or delete it") from None
    return defaults
