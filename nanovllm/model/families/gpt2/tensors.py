"""The tensors of a GPT-2 checkpoint: their names, their shapes, and where they belong.

GPT-2 stores its linear layers as [in, out] (the "Conv1D" of the original code), and query, key and
value side by side in the columns of one matrix.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights

PREFIX = "transformer."
LAYERS = "h."
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks in older checkpoints
EMBEDDING = "wte.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a checkpoint with this config."""
    d_model, d_ff = config.d_model, config.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab, d_model),
        "wpe.weight": (config.max_positions, d_model),
    }
    block: dict[str, tuple[int, ...]] = {
        "attn.c_attn": (d_model, 3 * d_model),
        "attn.c_proj": (d_model, d_model),
        "mlp.c_fc": (d_model, d_ff),
        "mlp.c_proj": (d_ff, d_model),
        "ln_1": (d_model,),
        "ln_2": (d_model,),
    }
    for layer in range(config.layers):
        for name, shape in block.items():
            shapes |= {
                f"{LAYERS}{layer}.{name}.weight": shape,
                f"{LAYERS}{layer}.{name}.bias": shape[-1:],
            }
    shapes |= {"ln_f.weight": (d_model,), "ln_f.bias": (d_model,)}
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab, d_model)
    return shapes


def build_tree(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, layers: Sequence[Layer[Linear]]
) -> ModelWeights:
    """Return the weights of a network with these blocks; `arrays` has the others by name."""
    head = arrays[EMBEDDING] if config.tied_head else arrays["lm_head.weight"]
    final_norm = LayerNorm(arrays["ln_f.weight"], arrays["ln_f.bias"])
    return ModelWeights(arrays[EMBEDDING], arrays["wpe.weight"], layers, final_norm, head)


def build_layer(
    arrays: Mapping[str, np.ndarray], _config: ModelConfig, index: int
) -> Layer[Linear]:
    """Return a block from arrays by name."""

    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        whole = f"{LAYERS}{index}.{name}"
        return arrays[f"{whole}.weight"], arrays[f"{whole}.bias"]

    return Layer(
        attention_norm=LayerNorm(*pair("ln_1")),
        qkv=Linear(*pair("attn.c_attn")),
        out=Linear(*pair("attn.c_proj")),
        ffn_norm=LayerNorm(*pair("ln_2")),
        up=Linear(*pair("mlp.c_fc")),
        down=Linear(*pair("mlp.c_proj")),
    )
