"""Sampling defaults of a model, from its generation_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from nanovllm.errors import CheckpointError, InvalidRequestError
from nanovllm.model.config import load_generation_config
from nanovllm.sampling_params import SamplingParams


class SamplingDefaults(TypedDict, total=False):
    """Fields of SamplingParams that generation_config.json may set."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


def load_sampling_defaults(folder: Path) -> SamplingDefaults:
    """Return the sampling defaults of a model folder; empty if it has none.

    Null settings are omitted. Raises CheckpointError if a setting is invalid, because every request
    that uses the default would fail.
    """
    config: Mapping[str, Any] = load_generation_config(folder)
    names = SamplingDefaults.__annotations__
    defaults = cast(
        "SamplingDefaults", {name: config[name] for name in names if config.get(name) is not None}
    )
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        path = folder / "generation_config.json"
        raise CheckpointError(f"{path} is invalid: {error}; correct or delete it") from None
    return defaults
