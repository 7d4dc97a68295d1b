"""Tiny checkpoints of families other than GPT-2: configs, and weights drawn from a seed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanovllm.learn.tiny_model import bell
from nanovllm.model.checkpoint import expected_shapes
from nanovllm.model.families.registry import read_config

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "max_position_embeddings": 128,
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 50, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "qwen2": {**_LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {
        **_LLAMA,
        "architectures": ["Qwen3ForCausalLM"],
        "use_sliding_window": False,
        "head_dim": 16,
        "attention_bias": False,
    },
}
"""By model_type: a network with two small blocks, whose query heads share keys and values."""


def draw_family_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return every float32 tensor of a config.json by its name without prefix."""
    bits = np.random.PCG64(seed)
    tensors = {}
    for name, shape in expected_shapes(read_config(config)).items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            mean, spread = 0.0, 2.4 / shape[1] ** 0.5
        elif len(shape) == 2:
            mean, spread = 0.0, 1.0 / shape[1] ** 0.5
        else:
            mean, spread = (0.0, 0.2) if name.endswith("bias") else (1.0, 0.3)
        tensors[name] = mean + np.float32(spread) * bell(bits, shape)
    return tensors
