"""Convert a GPT-2 checkpoint to GGUF for llama.cpp: f32.gguf, bf16.gguf and q8_0.gguf.

Run with the peers' Python, which has gguf: python -m benchmarks.peers.make_gguf models/gpt2-random
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_KINDS = {"f32": ("F32", 0), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
_NORMS = {"attn_norm": "ln_1", "ffn_norm": "ln_2"}
_PRODUCTS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
"""{name in GGUF: name in the checkpoint}, within a layer."""


def write(folder: Path, name: str) -> Path:
    """Write one file and return its path."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    kind = gguf.GGMLQuantizationType[_KINDS[name][0]]
    out = gguf.GGUFWriter(str(folder / f"{name}.gguf"), "gpt2")
    _add_header(out, config, _KINDS[name][1])
    _add_tokenizer(out, folder, config)

    def add(
        name_there: str, name_here: str, is_matrix: bool = False, is_transposed: bool = False
    ) -> None:
        value = weights[prefix + name_here].astype(np.float32)
        value = np.ascontiguousarray(value.T if is_transposed else value)
        if is_matrix and kind != gguf.GGMLQuantizationType.F32:
            out.add_tensor(name_there, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            out.add_tensor(name_there, value)

    add("token_embd.weight", "wte.weight", is_matrix=True)
    add("output.weight", "wte.weight", is_matrix=True)
    add("position_embd.weight", "wpe.weight")
    add("output_norm.weight", "ln_f.weight")
    add("output_norm.bias", "ln_f.bias")
    for layer in range(config["n_layer"]):
        for there, here in (*_NORMS.items(), *_PRODUCTS.items()):
            is_product = there in _PRODUCTS
            add(f"blk.{layer}.{there}.weight", f"h.{layer}.{here}.weight", is_product, is_product)
            add(f"blk.{layer}.{there}.bias", f"h.{layer}.{here}.bias")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return folder / f"{name}.gguf"


def _add_header(out: Any, config: dict[str, Any], file_type: int) -> None:
    out.add_name("gpt2")
    out.add_context_length(config["n_positions"])
    out.add_embedding_length(config["n_embd"])
    out.add_block_count(config["n_layer"])
    out.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    out.add_head_count(config["n_head"])
    out.add_layer_norm_eps(config["layer_norm_epsilon"])
    out.add_file_type(file_type)


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
