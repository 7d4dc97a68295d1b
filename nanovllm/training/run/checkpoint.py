"""The files of a run's checkpoints, each replaced atomically.

A process that is killed at any moment leaves the last complete file:

    config.json, model.safetensors, tokenizer.json   the best checkpoint, as Hugging Face stores it
    last/                                            the last checkpoint, in the same form
    resume.safetensors                               the state of the run, see training/resume.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nanovllm.model.config import ModelConfig
from nanovllm.model.families.gpt2.config import ABLATED
from nanovllm.training.atomic_files import write_atomically
from nanovllm.training.network.parameters import INITIAL_STD

RESUME_FILE = "resume.safetensors"
WEIGHTS_FILE = "model.safetensors"
LAST = "last"
_PREFIX = "transformer."


def hugging_face_config(config: ModelConfig, *, dropout: float) -> dict[str, Any]:
    """Return the config.json of a network, as transformers' GPT2Config reads it."""
    ids = list(config.eos_token_ids)
    eos_token_id = ids if len(ids) > 1 else ids[0] if ids else None
    return {
        "architectures": ["GPT2LMHeadModel" if config.is_gpt2 else "AblatedGPT2"],
        "model_type": "gpt2" if config.is_gpt2 else ABLATED,
        **({"ablated": list(config.ablated)} if config.ablated else {}),
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


def save_weights(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write model.safetensors with the names that transformers writes."""
    tensors = {
        name if name == "lm_head.weight" else _PREFIX + name: np.ascontiguousarray(array)
        for name, array in arrays.items()
    }
    save_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})


def save_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; raise as `write_atomically`."""
    write_atomically(path, lambda file: save_file(dict(tensors), file, metadata=dict(metadata)))
