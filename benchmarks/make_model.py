"""Make a GPT-2 checkpoint with random weights; speed does not depend on their values.

Run: python benchmarks/make_model.py models/gpt2-random --size gpt2

The weights have GPT-2's initial distribution. The tokenizer has the 256 bytes, pairs of bytes up to
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

_VOCAB = 50257
_POSITIONS = 1024
_SPREAD = 0.02
_END_OF_TEXT = "<|endoftext|>"


def make_model(folder: Path, size: str = "gpt2", *, seed: int = 0, **changes: Any) -> Path:
    """Write config, weights and tokenizer to `folder`; `changes` override the config."""
    config: dict[str, Any] = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": _VOCAB,
        "n_positions": _POSITIONS, "n_ctx": _POSITIONS, **SIZES[size],
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "torch_dtype": "float32",
        **changes,
    }  # fmt: skip
    end = config["vocab_size"] - 1
    config.update(bos_token_id=end, eos_token_id=end)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, config["vocab_size"], config["n_positions"])
    save_file(_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    # The config comes last: a folder that has one is whole.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


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
    pairs = list(itertools.islice(itertools.product(letters, letters), vocab - len(letters) - 1))
    names = [*letters, *(left + right for left, right in pairs), _END_OF_TEXT]
    if len(names) != vocab:
        raise ValueError(
            f"vocab_size is {vocab} but must be from {len(letters) + 1} to "
            f"{len(letters) + 1 + len(letters) ** 2}"
        )
    tokenizer = Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=pairs)
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
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    print(make_model(parsed.folder, parsed.size, seed=parsed.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
