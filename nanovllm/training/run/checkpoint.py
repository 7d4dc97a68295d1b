"""The files of a run's checkpoints, each replaced atomically.

A process that is killed at any moment leaves the last complete file. The state for resuming is one
file, so weights, moments and counters always belong together:

    config.json, model.safetensors, tokenizer.json   the best checkpoint, as Hugging Face stores it
    last/                                            the last checkpoint, in the same form
    resume.safetensors                               parameters, moments, and counters as metadata
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanovllm.errors import TrainingError
from nanovllm.model.config import GPT2Config
from nanovllm.training.atomic_files import write_atomically
from nanovllm.training.network.parameters import INITIAL_STD

RESUME_FILE = "resume.safetensors"
WEIGHTS_FILE = "model.safetensors"
LAST = "last"
_PREFIX = "transformer."


def hugging_face_config(config: GPT2Config, *, dropout: float) -> dict[str, Any]:
    """Return the config.json of a network, as transformers' GPT2Config reads it."""
    ids = list(config.eos_token_ids)
    eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_positions": config.max_positions,
        "n_embd": config.d_model,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None if config.d_ff == 4 * config.d_model else config.d_ff,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.epsilon,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "tie_word_embeddings": config.tied_head,
        **({} if config.positions == "learned" else {"position_embedding": config.positions}),
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "resid_pdrop": dropout,
        "initializer_range": INITIAL_STD,
        "bos_token_id": ids[0] if ids else None,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
    }


def save_weights(folder: Path, config: GPT2Config, arrays: Mapping[str, np.ndarray]) -> None:
    """Write model.safetensors with the names that transformers writes."""
    tensors = {
        name if name == "lm_head.weight" else _PREFIX + name: np.ascontiguousarray(array)
        for name, array in arrays.items()
    }
    write_atomically(
        folder / WEIGHTS_FILE,
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )


def save_state(folder: Path, arrays: Mapping[str, np.ndarray], counters: Mapping[str, Any]) -> None:
    """Write the state for resuming: flat arrays, and counters as JSON in the metadata."""
    metadata = {"state": json.dumps(counters, allow_nan=False)}
    write_atomically(
        folder / RESUME_FILE, lambda path: save_file(dict(arrays), path, metadata=metadata)
    )


def load_counters(folder: Path) -> dict[str, Any]:
    """Return the counters of a saved state.

    Raises:
        TrainingError: the folder has no state, or the file is damaged.
    """
    path = folder / RESUME_FILE
    if not path.exists():
        raise TrainingError(
            f"{folder} has no {RESUME_FILE} to resume from; give the output folder of a run that "
            "was stopped, or begin a run with --data and --output"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            counters = json.loads((file.metadata() or {})["state"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged: {error}; the run cannot be resumed") from None
    if not isinstance(counters, dict):
        raise TrainingError(f"{path} is damaged: its state is no object")
    return counters


def load_state(folder: Path, into: Mapping[str, np.ndarray]) -> None:
    """Copy the arrays of a saved state into those of `into`.

    Raises:
        TrainingError: an array is missing or has another size.
    """
    path = folder / RESUME_FILE
    try:
        with safe_open(path, framework="numpy") as file:
            for name, array in into.items():
                stored = file.get_tensor(name)
                if stored.shape != array.shape or stored.dtype != array.dtype:
                    raise TrainingError(
                        f"{path}: {name} is {stored.dtype} {list(stored.shape)}, but the run's "
                        f"settings need {array.dtype} {list(array.shape)}"
                    )
                array[...] = stored
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged: {error}; the run cannot be resumed") from None
