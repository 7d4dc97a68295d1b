"""The families, and which one a config.json belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.config import (
    ModelConfig,
    check_fields,
    load_generation_config,
    read_json,
    token_ids_of,
)
from nanovllm.model.families.gpt2 import config as gpt2_config
from nanovllm.model.families.gpt2 import network as gpt2_network
from nanovllm.model.families.gpt2 import tensors as gpt2_tensors
from nanovllm.model.families.llama import config as llama_config
from nanovllm.model.families.llama import network as llama_network
from nanovllm.model.families.llama import tensors as llama_tensors


@dataclass(frozen=True, slots=True)
class Family:
    """A family's three modules, each with the functions of the other families' modules.

    Attributes:
        title: its name for people.
        config: MODEL_TYPES, read_config.
        tensors: PREFIX, LAYERS, BUFFERS, EMBEDDING, expected_shapes, build_tree, build_layer.
        network: embed, self_attention, feed_forward.
    """

    title: str
    config: ModuleType
    tensors: ModuleType
    network: ModuleType


FAMILIES = {
    "gpt2": Family("GPT-2", gpt2_config, gpt2_tensors, gpt2_network),
    "llama": Family("Llama", llama_config, llama_tensors, llama_network),
}
_UNSUPPORTED = {
    "quantization_config": "weights are read as float32, float16 or bfloat16; give the checkpoint "
    "from before its quantization (--quantization int8 quantizes it on load)",
}
_OF_MODEL_TYPE = {
    model_type: family for family in FAMILIES.values() for model_type in family.config.MODEL_TYPES
}
MODEL_TYPES = tuple(name for name in _OF_MODEL_TYPE if name != gpt2_config.ABLATED)
"""Values of `model_type` in config.json whose networks can be computed."""


def family_of(config: ModelConfig) -> Family:
    """Return the family that computes a network."""
    return FAMILIES[config.family]


def read_config(raw: Mapping[str, Any], *, may_be_ablated: bool = False) -> ModelConfig:
    """Read a parsed config.json; raise CheckpointError if no family computes its network.

    `may_be_ablated` allows a network that was trained without parts, so that no forward pass
    computes it.
    """
    model_type = raw.get("model_type")
    family = _OF_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        listed = raw.get("architectures")
        classes = (
            [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []
        )
        named = printable(model_type) if isinstance(model_type, str) else ""
        kind = f" ({printable(', '.join(classes))})" if classes else ""
        raise CheckpointError(
            f"this is a {named or 'nameless'} model{kind}; those that can be loaded have the "
            f"model_type {', '.join(MODEL_TYPES[:-1])} or {MODEL_TYPES[-1]}"
        )
    check_fields(raw, (), _UNSUPPORTED)
    if model_type == gpt2_config.ABLATED and not may_be_ablated:
        raise gpt2_config.ablated_refusal(raw)
    config: ModelConfig = family.config.read_config(raw)
    return config


def short_name(name: str) -> str | None:
    """Return a tensor's name without its family's prefix; None for one that is no parameter."""
    for family in FAMILIES.values():
        name = name.removeprefix(family.tensors.PREFIX)
    is_buffer = any(family.tensors.BUFFERS.fullmatch(name) for family in FAMILIES.values())
    return None if is_buffer else name


def load_config(folder: Path, *, may_be_ablated: bool = False) -> ModelConfig:
    """Read a model folder's config.json, and end-of-text ids of generation_config.json too."""
    raw = read_json(folder / "config.json")
    config = read_config(raw, may_be_ablated=may_be_ablated)
    more = token_ids_of(load_generation_config(folder).get("eos_token_id"))
    ids = tuple(i for i in dict.fromkeys(config.eos_token_ids + more) if 0 <= i < config.vocab)
    return replace(config, eos_token_ids=ids)
