"""Convert a checkpoint of GPT-2, Llama or Qwen3 to GGUF for llama.cpp: f32, bf16 and q8_0.

Run with the peers' Python, which has gguf: python -m benchmarks.peers.make_gguf models/gpt2-random
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_KINDS = {"f32": ("F32", 0), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
_FAMILIES = {"gpt2": "gpt2", "llama": "llama", "qwen3": "llama"}
"""{model_type: whose names its tensors have}."""
_NAMES = {
    "gpt2": {
        "token_embd": "wte", "output": "wte", "position_embd": "wpe", "output_norm": "ln_f",
    },
    "llama": {"token_embd": "model.embed_tokens", "output_norm": "model.norm"},
}  # fmt: skip
_LAYERS = {"gpt2": ("h", "n_layer"), "llama": ("model.layers", "num_hidden_layers")}
"""What the names of a layer's tensors begin with, and the number of layers in config.json."""
_LAYER_NAMES = {
    "gpt2": {
        "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    },
    "llama": {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
}  # fmt: skip
"""{name in GGUF: name in the checkpoint}; a tensor that a checkpoint lacks is left out."""


def write(folder: Path, name: str) -> Path:
    """Write one file and return its path."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"model_type {config['model_type']!r} is not converted; {known} are")
    family = _FAMILIES[config["model_type"]]
    found = load_file(folder / "model.safetensors")
    weights = {key.removeprefix("transformer."): value for key, value in found.items()}
    kind = gguf.GGMLQuantizationType[_KINDS[name][0]]
    out = gguf.GGUFWriter(str(folder / f"{name}.gguf"), config["model_type"])
    (_add_gpt2 if family == "gpt2" else _add_llama)(out, config)
    out.add_file_type(_KINDS[name][1])
    _add_tokenizer(out, folder, config)
    prefix, count = _LAYERS[family]
    pairs = list(_NAMES[family].items())
    for layer in range(config[count]):
        for there, here in _LAYER_NAMES[family].items():
            pairs.append((f"blk.{layer}.{there}", f"{prefix}.{layer}.{here}"))
    for there, here in pairs:
        for part in ("weight", "bias"):
            if f"{here}.{part}" not in weights:
                continue
            value = weights[f"{here}.{part}"]
            value = _as_gguf(value.astype(np.float32), there.rpartition(".")[2], config)
            is_matrix = value.ndim == 2 and there != "position_embd"
            if is_matrix and kind != gguf.GGMLQuantizationType.F32:
                value = gguf.quants.quantize(value, kind)
                out.add_tensor(f"{there}.{part}", value, raw_dtype=kind)
            else:
                out.add_tensor(f"{there}.{part}", value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / f"{name}.gguf"


def _as_gguf(value: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Return a tensor as llama.cpp has it.

    Matrices are [outputs, inputs]; GPT-2's are not. Llama's rotary positions turn neighbours there,
    and halves of a head in the checkpoint.
    """
    kind = config["model_type"]
    if kind == "gpt2" and value.ndim == 2 and name not in ("token_embd", "output", "position_embd"):
        return np.ascontiguousarray(value.T)
    if kind == "llama" and name in ("attn_q", "attn_k"):
        halves = value.reshape(-1, 2, _head_dim(config) // 2, value.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
    return value


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_gpt2(out: Any, config: dict[str, Any]) -> None:
    out.add_name("gpt2")
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(config["n_embd"])
    out.add_block_count(config["n_layer"])
    out.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(config["layer_norm_epsilon"])


def _add_llama(out: Any, config: dict[str, Any]) -> None:
    head_dim = _head_dim(config)
    out.add_name(config["model_type"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_rope_dimension_count(head_dim)
    out.add_vocab_size(config["vocab_size"])
    if config.get("rope_scaling"):
        out.add_tensor("rope_freqs.weight", _rope_divisors(config, head_dim))


def _rope_divisors(config: dict[str, Any], head_dim: int) -> np.ndarray:
    """Return by how much Llama 3's scaling divides each rotary frequency, [head_dim / 2].

    nanovllm/model/rotary.py has the formula too, but needs packages that the peers lack.
    """
    scaling = config["rope_scaling"]
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"rope_type {scaling['rope_type']!r} is not converted; llama3 is")
    powers = np.arange(0, head_dim, 2) / head_dim
    turns = scaling["original_max_position_embeddings"] / (
        2 * math.pi * config["rope_theta"] ** powers
    )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray = 1 / (kept + (1 - kept) / scaling["factor"])
    return divisors.astype(np.float32)


def _add_tokenizer(out: Any, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += ["<|endoftext|>"] * (config["vocab_size"] - len(tokens))
    normal, control = 1, 3
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([token.encode() for token in tokens])
    out.add_token_types([normal] * (len(tokens) - 1) + [control])
    out.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    )
    out.add_bos_token_id(config["bos_token_id"])
    out.add_eos_token_id(config["eos_token_id"])


if __name__ == "__main__":
    for each in _KINDS:
        print(write(Path(sys.argv[1]), each))
