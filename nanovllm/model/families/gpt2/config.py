"""GPT-2's config.json, as transformers writes it."""

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.config import (
    EMBEDDED_POSITIONS,
    ModelConfig,
    check_fields,
    is_whole,
    refusal,
    shown,
    token_ids_of,
)

ABLATED = "ablated-gpt2"
"""The model_type of networks that GPT-2's forward pass does not compute, so that no program takes
them for GPT-2."""
MODEL_TYPES = ("gpt2", ABLATED)
_UNSUPPORTED = {
    "add_cross_attention": "the forward pass has no cross-attention; use a model without it",
    "pruned_heads": "every layer has all of its heads; give the checkpoint from before the pruning",
}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json; raise CheckpointError for what cannot be computed."""
    check_fields(raw, ("vocab_size", "n_embd", "n_layer", "n_head"), _UNSUPPORTED)
    d_model, d_ff = raw["n_embd"], raw.get("n_inner")
    positions = raw.get("position_embedding", "learned")
    if positions not in EMBEDDED_POSITIONS:
        kinds = ", ".join(EMBEDDED_POSITIONS)
        raise refusal([f"position_embedding is {shown(positions)} but must be one of {kinds}"])
    return ModelConfig(
        vocab=raw["vocab_size"],
        max_positions=raw.get("n_positions", raw.get("n_ctx", 1024)),
        d_model=d_model,
        layers=raw["n_layer"],
        heads=raw["n_head"],
        d_ff=d_ff if d_ff is not None else 4 * d_model if is_whole(d_model) else 0,
        epsilon=raw.get("layer_norm_epsilon", 1e-5),
        activation=raw.get("activation_function", "gelu_new"),
        scale_attn_weights=raw.get("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=raw.get("scale_attn_by_inverse_layer_idx", False),
        tied_head=raw.get("tie_word_embeddings", True),
        positions=positions,
        eos_token_ids=token_ids_of(raw.get("eos_token_id")),
        ablated=tuple(raw["ablated"]) if isinstance(raw.get("ablated"), list) else (),
    )


def ablated_refusal(raw: Mapping[str, Any]) -> CheckpointError:
    """Return the error for a network that GPT-2's forward pass does not compute."""
    parts = raw.get("ablated")
    named = printable(", ".join(map(str, parts))) if isinstance(parts, list) else "parts"
    return CheckpointError(
        f"this network was trained without its {named} (nanovllm train --ablate), so GPT-2's "
        "forward pass does not compute it; samples.jsonl and report.html in the folder of its run "
        "show what it writes"
    )
