"""The arguments of each compiled operation: a record of 64-bit integers. Needs no Numba.

A field that ends in `_ptr` is an address, one that ends in `_bits` the bits of a float32, and every
other one a count or a number. runner.py writes them.
"""

from collections.abc import Mapping

import numpy as np

from nanovllm.model.kernels.step_record import ACTIVATION_NAMES, FLOAT32, INT64, record_dtype

COMMON_FIELDS = ("job_ptr", "phases_ptr", "threads")
"""Fields of every record."""
_ATTENTION = """
    batch context heads head_dim scale_bits key_ptr threshold factor_bits
    qkv_ptr out_ptr logsumexp_ptr scratch_ptr scratch_bytes row_bytes scores_row_bytes
    keys_offset scores_offset
"""

RECORDS: Mapping[str, np.dtype] = {
    name: record_dtype(f"{' '.join(COMMON_FIELDS)} {fields}")
    for name, fields in {
        "adamw": """
            parameters_ptr gradients_ptr first_moment_ptr second_moment_ptr count
            gradient_scale_bits first_rate_bits second_rate_bits first_correction_bits
            second_correction_bits learning_rate_bits decay_bits epsilon_bits
        """,
        "sum_of_squares": "values_ptr partial_sums_ptr count",
        "dropout": "residual_ptr x_ptr out_ptr count key_ptr threshold factor_bits",
        "attention": f"{_ATTENTION} values_offset sums_offset factors_offset",
        "attention_backward": f"""{_ATTENTION} grad_out_ptr grad_qkv_ptr
            queries_t_offset grads_t_offset queries_offset grads_offset grad_queries_offset
            logsumexp_offset dots_offset grad_scores_offset grad_values_offset grad_keys_offset
        """,
        "layer_norm": """
            x_ptr gain_ptr bias_ptr out_ptr mean_ptr inverse_ptr rows d_model epsilon_bits
        """,
        "layer_norm_backward": """
            grad_out_ptr x_ptr gain_ptr mean_ptr inverse_ptr onto_ptr grad_x_ptr
            partial_ptr grad_gain_ptr grad_bias_ptr rows d_model
        """,
        "embed": """
            token_ids_ptr token_embedding_ptr position_embedding_ptr out_ptr rows context d_model
        """,
        "embed_backward": """
            grad_out_ptr token_ids_ptr grad_token_embedding_ptr grad_position_embedding_ptr
            rows context d_model
        """,
        "linear": """
            x_ptr weight_ptr bias_ptr residual_ptr slope_ptr out_ptr panels_ptr scratch_ptr
            rows d_in d_out kind
        """,
        "linear_backward": """
            grad_out_ptr slope_ptr x_ptr weight_ptr grad_weight_ptr grad_bias_ptr grad_x_ptr
            grad_panels_ptr weight_panels_ptr bias_sums_ptr scratch_ptr rows d_in d_out
        """,
        "pack_head": "head_ptr transposed_panels_ptr panels_ptr vocab d_model",
        "cross_entropy": """
            head_ptr hidden_ptr targets_ptr transposed_panels_ptr panels_ptr hidden_panels_ptr
            logits_ptr grad_hidden_ptr grad_head_ptr sums_ptr target_logits_ptr scratch_ptr
            rows vocab d_model scale_bits
        """,
    }.items()
}
"""The record of each operation, by the name of its entry."""

DTYPES: Mapping[str, tuple[np.dtype, ...]] = {
    **{
        field.removesuffix("_ptr"): FLOAT32
        for record in RECORDS.values()
        for field in record.names or ()
    },
    "partial_sums": (np.dtype(np.float64),),
    "token_ids": INT64,
    "targets": INT64,
    "key": (np.dtype(np.uint64),),
}
"""Types of the arrays by name."""

MAX_PHASES = 16
"""Most phases (threads/phase.py) of an operation."""
ITEM_ELEMENTS = 1 << 14
"""Elements of a flat array that a thread takes at a time."""
ITEM_ROWS = 64
"""Rows that a thread takes at a time in a layer normalization or an embedding."""
STRIP = 32
"""Columns that a thread takes at a time where it adds up rows."""

KINDS = ACTIVATION_NAMES
"""An epilogue (epilogue.py) is the number of an activation."""
IDENTITY = KINDS.index("linear")

BLOCK_ROWS = 96
"""Most rows of a block of a matmul (matmul.py)."""
MAX_PIECE = 384
"""Most steps of a piece of a matmul."""
SCRATCH_FLOATS = BLOCK_ROWS * MAX_PIECE + 1024
"""Working memory of a thread in a matmul."""
GRADIENT_ROWS = 32
"""Rows of a gradient that are packed together (linear.py): they fit the second-level cache."""
LOGITS_FLOATS = 1 << 20
"""Logits in memory at a time (cross_entropy.py), if these are at least MAX_PIECE rows."""
