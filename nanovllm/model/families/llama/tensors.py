"""The tensors of a Llama checkpoint: their names, their shapes, and where they belong.

Linear layers are stored as [out, in]. Queries, keys and values are tensors of their own, and so are
the gate and the inputs of the feed-forward block; here they become columns of one matrix.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.model.config import ModelConfig
from nanovllm.model.weights import Layer, LayerNorm, Linear, ModelWeights

PREFIX = "model."
LAYERS = "layers."
BUFFERS = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in older checkpoints
EMBEDDING = "embed_tokens.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a checkpoint with this config."""
    d_model, d_ff = config.d_model, config.d_ff
    queries, keys = config.queries_width, config.keys_width
    linears: dict[str, tuple[int, int, bool]] = {
        "self_attn.q_proj": (queries, d_model, "qkv" in config.biased),
        "self_attn.k_proj": (keys, d_model, "qkv" in config.biased),
        "self_attn.v_proj": (keys, d_model, "qkv" in config.biased),
        "self_attn.o_proj": (d_model, queries, "out" in config.biased),
        "mlp.gate_proj": (d_ff, d_model, "ffn" in config.biased),
        "mlp.up_proj": (d_ff, d_model, "ffn" in config.biased),
        "mlp.down_proj": (d_model, d_ff, "ffn" in config.biased),
    }
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d_model,),
        "post_attention_layernorm.weight": (d_model,),
    }
    for name, (d_out, d_in, has_bias) in linears.items():
        block[f"{name}.weight"] = (d_out, d_in)
        if has_bias:
            block[f"{name}.bias"] = (d_out,)
    if config.has_query_norm:
        block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab, d_model)}
    for layer in range(config.layers):
        shapes |= {f"{LAYERS}{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (d_model,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab, d_model)
    return shapes


def build_tree(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, layers: Sequence[Layer[Linear]]
) -> ModelWeights:
    """Return the weights of a network with these blocks; `arrays` has the others by name."""
    embedding = arrays[EMBEDDING]
    head = embedding if config.tied_head else arrays["lm_head.weight"]
    no_positions = np.zeros((0, config.d_model), dtype=np.float32)
    return ModelWeights(embedding, no_positions, layers, _norm(arrays["norm.weight"]), head)


def build_layer(arrays: Mapping[str, np.ndarray], config: ModelConfig, index: int) -> Layer[Linear]:
    """Return a block from arrays by name."""

    def array(name: str) -> np.ndarray | None:
        return arrays.get(f"{LAYERS}{index}.{name}")

    def linear(*names: str) -> Linear:
        weights = [arrays[f"{LAYERS}{index}.{name}.weight"] for name in names]
        biases = [array(f"{name}.bias") for name in names]
        no_bias = np.zeros(sum(map(len, weights)), dtype=np.float32)
        given = [bias for bias in biases if bias is not None]
        return Linear(np.concatenate(weights).T, np.concatenate(given) if given else no_bias)

    return Layer(
        attention_norm=_norm(arrays[f"{LAYERS}{index}.input_layernorm.weight"]),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
        ffn_norm=_norm(arrays[f"{LAYERS}{index}.post_attention_layernorm.weight"]),
        up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
        query_gain=array("self_attn.q_norm.weight"),
        key_gain=array("self_attn.k_norm.weight"),
    )


def _norm(gain: np.ndarray) -> LayerNorm:
    return LayerNorm(gain, np.zeros_like(gain))
