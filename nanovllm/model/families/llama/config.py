"""The config.json of Llama and its relatives, as transformers writes it.

What differs between them:

| model_type | beside Llama                                                     |
|------------|------------------------------------------------------------------|
| llama      | Llama 2 and 3, TinyLlama, SmolLM2                                |
| mistral    | a window of `sliding_window` tokens                              |
| qwen2      | a bias on queries, keys and values                               |
| qwen3      | an RMS norm on each head's queries and keys; heads of width 128  |
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.model.config import (
    ModelConfig,
    check_fields,
    is_positive,
    refusal,
    shown,
    token_ids_of,
)
from nanovllm.model.rotary import SCALINGS, Rotary

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_UNSUPPORTED = {
    "use_sliding_window": "layers with windows beside layers without are not computed; set it to "
    "false if the checkpoint is used with short texts",
}
_SCALING_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_turns",
        "high_freq_factor": "high_turns",
        "original_max_position_embeddings": "first_context",
    },
}
"""Fields of each scaling, and their names in Rotary."""
_DEFAULT_HEAD_DIM = {"qwen3": 128}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json; raise CheckpointError for what cannot be computed."""
    model_type = raw["model_type"]
    needed = _NEEDED if model_type == "llama" else (*_NEEDED, "num_key_value_heads")
    check_fields(raw, needed, _UNSUPPORTED)
    attention_biases = {"qwen2": {"qkv"}, "mistral": set()}.get(
        model_type, {"qkv", "out"} if raw.get("attention_bias") else set()
    )
    kv_heads, head_dim = raw.get("num_key_value_heads"), raw.get("head_dim")
    return ModelConfig(
        family="llama",
        vocab=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings", 2048),
        d_model=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=0 if kv_heads is None else _above_0(kv_heads),
        head_dim=_DEFAULT_HEAD_DIM.get(model_type, 0) if head_dim is None else _above_0(head_dim),
        d_ff=raw["intermediate_size"],
        norm="rms",
        epsilon=raw.get("rms_norm_eps", 1e-6),
        activation=raw.get("hidden_act", "silu"),
        is_gated=True,
        biased=frozenset(attention_biases | ({"ffn"} if raw.get("mlp_bias") else set())),
        has_query_norm=model_type == "qwen3",
        window=raw.get("sliding_window", 4096) if model_type == "mistral" else None,
        tied_head=raw.get("tie_word_embeddings", False),
        positions="rotary",
        rotary=_read_rotary(raw),
        eos_token_ids=token_ids_of(raw.get("eos_token_id")),
    )


def _above_0(size: Any) -> Any:
    """Return a size; 0, which would stand for a derived one, becomes a value that is refused."""
    return -1 if size == 0 else size


def _read_rotary(raw: Mapping[str, Any]) -> Rotary:
    """Read `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise refusal([f"rope_scaling is {shown(given)} but must be an object"])
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in SCALINGS:
        raise refusal([f"rope_type is {shown(kind)} but must be one of {', '.join(SCALINGS)}"])
    numbers = {"rope_theta": given.get("rope_theta", raw.get("rope_theta", 10000.0))}
    numbers |= {name: given.get(name) for name in _SCALING_FIELDS.get(kind, {})}
    problems = [
        f"{name} of the rotary positions is {shown(value)} but must be a number above 0"
        for name, value in numbers.items()
        if not is_positive(value)
    ]
    turned = given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if turned != 1.0:
        problems.append(
            f"partial_rotary_factor is {shown(turned)}: all of a head is turned; use another model"
        )
    if (
        not problems
        and kind == "llama3"
        and numbers["low_freq_factor"] >= (high := numbers["high_freq_factor"])
    ):
        problems.append(f"low_freq_factor must be below high_freq_factor, which is {shown(high)}")
    if problems:
        raise refusal(problems)
    named: dict[str, Any] = {
        ours: float(numbers[theirs]) for theirs, ours in _SCALING_FIELDS.get(kind, {}).items()
    }
    return Rotary(float(numbers["rope_theta"]), kind, **named)
