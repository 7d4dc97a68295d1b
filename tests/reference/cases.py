"""The configurations, file forms and prompts with which we compare against the reference.

Each case is a set of arguments for `tests.support.checkpoints.write_checkpoint`.
"""

import zlib
from typing import Any

import numpy as np

GREEDY_TOKENS = 24
GREEDY_PROMPT = 3
"""The index of the prompt to continue: its 31 tokens make the continuation leave a block of 32."""
TOP_EVERY = 32
"""The likeliest tokens are recorded at every so many positions of a prompt, from the first."""

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate",
    "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "silu", "swish", "sigmoid", "tanh",
    "mish", "linear",
)  # fmt: skip
SMALL_EMBEDDING = {"wte.weight": 0.05, "wpe.weight": 0.05}
OUTLIER_SIZES = {"n_embd": 64, "n_layer": 3}


def _config(**overrides: Any) -> dict[str, Any]:
    return {"config": overrides}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{
        f"activation-{name}": {
            **_config(activation_function=name),
            "scales": {"mlp.c_fc.weight": 2.0},
        }
        for name in ACTIVATIONS
    },
    "n_inner-50": _config(n_inner=50),
    "n_inner-16": _config(n_inner=16),
    "epsilon-1e-6": {**_config(layer_norm_epsilon=1e-6), "scales": SMALL_EMBEDDING, "tied": False},
    "epsilon-1e-3": {**_config(layer_norm_epsilon=1e-3), "scales": SMALL_EMBEDDING, "tied": False},
    "scores-unscaled": _config(scale_attn_weights=False),
    "scores-by-layer": _config(scale_attn_by_inverse_layer_idx=True, n_layer=4),
    "scores-unscaled-by-layer": _config(
        scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_layer=4
    ),
    "reorder-and-upcast": _config(
        reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True
    ),
    "head_dim-1": _config(n_embd=12, n_head=12),
    "head_dim-5": _config(n_embd=35, n_head=7),
    "head_dim-24": _config(n_embd=48, n_head=2),
    "head_dim-80": _config(n_embd=160, n_head=2),
    "head-alone": _config(n_head=1),
    "layer-alone": _config(n_layer=1),
    "vocab-257": _config(vocab_size=257),
    "vocab-2": _config(vocab_size=2),
    "untied": {"tied": False},
    "untied-no-prefix": {"tied": False, "prefix": False},
    "tied-head-stored": {"stored_head": True},
    "no-prefix-buffers": {"prefix": False, "buffers": True},
    "published-gpt2-form": {"prefix": False, "buffers": True, "aligned": False},
    "buffers-sharded": {"buffers": True, "shards": 3},
    "float16": {"dtype": "F16"},
    "float16-unaligned": {"dtype": "F16", "aligned": False, "prefix": False},
    "bfloat16": {"dtype": "BF16"},
    "bfloat16-untied-sharded": {"dtype": "BF16", "tied": False, "shards": 2, "prefix": False},
    "residual-mean-far-from-0": {"shifts": {"h.0.mlp.c_proj.bias": 24.0}},
    "outliers": {**_config(**OUTLIER_SIZES), "outliers": True},
    "outliers-untied": {**_config(**OUTLIER_SIZES), "outliers": True, "tied": False},
    "outliers-bfloat16": {**_config(**OUTLIER_SIZES), "outliers": True, "dtype": "BF16"},
}

_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip


def _family(model_type: str, **overrides: Any) -> dict[str, Any]:
    tied = overrides.pop("tied", False)
    return {"config": {"model_type": model_type, **overrides}, "tied": tied}


FAMILY_CASES: dict[str, dict[str, Any]] = {
    "llama": _family("llama"),
    "llama-all-heads": _family("llama", num_key_value_heads=4, rope_theta=500.0),
    "llama-heads-9-3": _family(
        "llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tied=True
    ),
    "llama-one-kv-head": _family("llama", num_key_value_heads=1, head_dim=6),
    "llama-head_dim-64": _family("llama", head_dim=64, num_attention_heads=2),
    "llama-biases": _family("llama", attention_bias=True, mlp_bias=True),
    "llama-gelu": _family("llama", hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-2),
    "llama-linear": _family("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-llama3": _family("llama", head_dim=16, rope_scaling=_LLAMA3, rope_theta=1000.0),
    "llama-rope-parameters": _family(
        "llama", head_dim=16, rope_theta=..., rope_parameters={**_LLAMA3, "rope_theta": 1000.0}
    ),
    "llama-bfloat16-sharded": {**_family("llama"), "dtype": "BF16", "shards": 3},
    "llama-no-prefix": {**_family("llama"), "prefix": False, "dtype": "F16"},
    "mistral": _family("mistral"),
    "mistral-window-1": _family("mistral", sliding_window=1),
    "mistral-no-window": _family("mistral", sliding_window=None),
    "qwen2": _family("qwen2", tied=True),
    "qwen3": _family("qwen3"),
    "qwen3-head_dim-128": _family("qwen3", head_dim=..., num_attention_heads=2, tied=True),
}
"""The same for other families."""
GPT2_CASES = dict(CASES)
CASES |= FAMILY_CASES

_TRAINING_SIZES = {"vocab_size": 23, "n_positions": 16, "n_embd": 6, "n_head": 2}
TRAINING_CASES: dict[str, dict[str, Any]] = {
    f"{name}{'' if tied else '-untied'}": {
        "config": {**_TRAINING_SIZES, "activation_function": name},
        "tied": tied,
        "seed": 5,
    }
    for name in ACTIVATIONS
    for tied in (True, False)
}
"""Networks whose losses and whole gradients on `training_tokens` are recorded."""

UPDATE_CASE, UPDATE_CLIPS = "gelu_new", (0.01, 0.0)
"""The network that is updated twice, with its recorded gradients, clipped and not clipped."""
UPDATE_RATE, UPDATE_DECAY = 1e-2, 0.3

ATTENTION_CASES = ("plain", "scores-unscaled-by-layer", "head_dim-5")


def options_of(name: str) -> dict[str, Any]:
    """The arguments of a case, with a seed of its own, made from its name."""
    return {"seed": zlib.crc32(name.encode()), **CASES[name]}


def prompts_of(vocab: int, max_positions: int = 128) -> list[np.ndarray]:
    """Return prompts of lengths around the edges of blocks and of the context, and a long one."""
    lengths = [1, 2, 33, 31, 32, 100, max_positions]
    bits = np.random.PCG64(vocab)
    return [
        (np.asarray(bits.random_raw(length), dtype=np.uint64) % np.uint64(vocab)).astype(np.int64)
        for length in lengths
    ]


def attention_prompt() -> np.ndarray:
    """Return the prompt whose attention weights are recorded."""
    return prompts_of(97)[2][:20]


def training_tokens() -> np.ndarray:
    """Return the tokens [sequences, tokens] of a training case."""
    return np.arange(26).reshape(2, 13) * 11 % _TRAINING_SIZES["vocab_size"]
