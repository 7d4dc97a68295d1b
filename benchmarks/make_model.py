"""Make a checkpoint with random weights; speed does not depend on their values.

Run: python benchmarks/make_model.py models/gpt2-random --size gpt2

The sizes are those of GPT-2, and of small models of the Llama family. The weights have GPT-2's
initial distribution, in float32. The tokenizer has the 256 bytes, pairs and triples of bytes up to
the vocabulary's size, and an end-of-text token, so that every token id decodes to text.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SIZES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
"""124, 355, 774 and 1,558 million parameters."""

_LLAMA = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "initializer_range": 0.02, "torch_dtype": "float32",
}  # fmt: skip
LLAMA_SIZES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **_LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    },
    "qwen3-0.6b": {
        **_LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "use_sliding_window": False,
    },
    "llama-3.2-1b": {
        **_LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip
"""135, 596 and 1,236 million parameters, as config.json has them."""

_VOCAB = 50257
_POSITIONS = 1024
_SPREAD = 0.02
_END_OF_TEXT = "<|endoftext|>"


def make_model(folder: Path, size: str = "gpt2", *, seed: int = 0, **changes: Any) -> Path:
    """Write config, weights and tokenizer to `folder`; `changes` override the config."""
    config = {**_size(size), **changes}
    end = config["vocab_size"] - 1
    config.update(bos_token_id=end, eos_token_id=end)
    folder.mkdir(parents=True, exist_ok=True)
    is_gpt2 = config["model_type"] == "gpt2"
    positions = config["n_positions" if is_gpt2 else "max_position_embeddings"]
    _write_tokenizer(folder, config["vocab_size"], positions)
    tensors = (_tensors if is_gpt2 else _llama_tensors)(config, seed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The config comes last: a folder that has one is whole.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _size(size: str) -> dict[str, Any]:
    """Return the config of a size."""
    if size in LLAMA_SIZES:
        return LLAMA_SIZES[size]
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": _VOCAB,
        "n_positions": _POSITIONS, "n_ctx": _POSITIONS, **SIZES[size],
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip


def _llama_tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    # The peers' Python makes GPT-2 without the packages that nanovllm needs.
    from nanovllm.model.families.llama.tensors import PREFIX, expected_shapes  # noqa: PLC0415
    from nanovllm.model.families.registry import read_config  # noqa: PLC0415

    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:  # a norm
            return np.ones(shape, dtype=np.float32)
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(_SPREAD)
        return values

    shapes = expected_shapes(read_config(config))
    return {PREFIX + name: draw(shape) for name, shape in shapes.items()}


def _tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    d_model = config["n_embd"]

    def normal(*shape: int, spread: float = _SPREAD) -> np.ndarray:
        values = rng.standard_normal(shape, dtype=np.float32)
        values *= np.float32(spread)
        return values

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": np.ones(d_model, dtype=np.float32),
            f"{name}.bias": np.zeros(d_model, dtype=np.float32),
        }

    def product(name: str, d_in: int, d_out: int, spread: float = _SPREAD) -> dict[str, np.ndarray]:
        return {
            f"{name}.weight": normal(d_in, d_out, spread=spread),
            f"{name}.bias": np.zeros(d_out, dtype=np.float32),
        }

    into_residual = _SPREAD / math.sqrt(2 * config["n_layer"])
    tensors = {
        "transformer.wte.weight": normal(config["vocab_size"], d_model),
        "transformer.wpe.weight": normal(config["n_positions"], d_model),
    }
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        tensors |= norm(f"{name}.ln_1") | norm(f"{name}.ln_2")
        tensors |= product(f"{name}.attn.c_attn", d_model, 3 * d_model) | product(
            f"{name}.attn.c_proj", d_model, d_model, into_residual
        )
        tensors |= product(f"{name}.mlp.c_fc", d_model, 4 * d_model) | product(
            f"{name}.mlp.c_proj", 4 * d_model, d_model, into_residual
        )
    return tensors | norm("transformer.ln_f")


def _write_tokenizer(folder: Path, vocab: int, positions: int) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(
        itertools.islice(
            itertools.chain(
                itertools.product(letters, letters),
                itertools.product(map("".join, itertools.product(letters, letters)), letters),
            ),
            vocab - len(letters) - 1,
        )
    )
    names = [*letters, *(left + right for left, right in merges), _END_OF_TEXT]
    if len(names) != vocab:
        most = sum(len(letters) ** length for length in (1, 2, 3)) + 1
        raise ValueError(f"vocab_size is {vocab} but must be from {len(letters) + 1} to {most}")
    tokenizer = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": positions,
        "bos_token": _END_OF_TEXT,
        "eos_token": _END_OF_TEXT,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def main() -> int:
    """Make the model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=[*SIZES, *LLAMA_SIZES], default="gpt2")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    print(make_model(parsed.folder, parsed.size, seed=parsed.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
