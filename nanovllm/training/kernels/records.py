"""The arguments of each compiled operation: a record of 64-bit integers. Needs no Numba.

A field that ends in `_ptr` is an address, one that ends in `_bits` the bits of a float32, and every
other one a count or a number. runner.py writes them.
"""

import re
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
_OPERATIONS = {
    "adamw": """
        parameters[count] gradients[count] first_moment[count] second_moment[count]
        gradient_scale_bits first_rate_bits second_rate_bits first_correction_bits
        second_correction_bits learning_rate_bits decay_bits epsilon_bits
    """,
    "sum_of_squares": "values[count] partial_sums_ptr",
    "dropout": "residual[count] x[count] out[count] key_ptr threshold factor_bits",
    "attention": f"{_ATTENTION} values_offset sums_offset factors_offset",
    "attention_backward": f"""{_ATTENTION} grad_out_ptr grad_qkv_ptr
        queries_t_offset grads_t_offset queries_offset grads_offset grad_queries_offset
        logsumexp_offset dots_offset grad_scores_offset grad_values_offset grad_keys_offset
    """,
    "layer_norm": """
        x[rows,d_model] gain[d_model] bias[d_model] out[rows,d_model] mean[rows] inverse[rows]
        epsilon_bits
    """,
    "layer_norm_backward": """
        grad_out[rows,d_model] x[rows,d_model] gain[d_model] mean[rows] inverse[rows]
        onto[rows,d_model] grad_x[rows,d_model] partial_ptr grad_gain[d_model] grad_bias[d_model]
    """,
    "embed": """
        token_ids[batch,context] token_embedding[vocab,d_model]
        position_embedding[positions,d_model] out[rows,d_model]
    """,
    "embed_backward": """
        grad_out[rows,d_model] token_ids[batch,context] grad_token_embedding[vocab,d_model]
        grad_position_embedding[positions,d_model]
    """,
    "linear": """
        x[rows,d_in] weight[d_in,d_out] bias[d_out] residual[rows,d_out] slope[rows,d_out]
        out[rows,d_out] panels_ptr scratch_ptr kind
    """,
    "linear_backward": """
        grad_out[rows,d_out] slope[rows,d_out] x[rows,d_in] weight[d_in,d_out]
        grad_weight[d_in,d_out] grad_bias[d_out] grad_x[rows,d_in]
        grad_panels_ptr weight_panels_ptr bias_sums_ptr scratch_ptr
    """,
    "run_calls": "calls_ptr count",
    "pack_head": "head[vocab,d_model] transposed_panels_ptr panels_ptr",
    "cross_entropy": """
        head[vocab,d_model] hidden[rows,d_model] targets[rows] transposed_panels_ptr panels_ptr
        hidden_panels_ptr logits_ptr grad_hidden[rows,d_model] grad_head[vocab,d_model] sums[rows]
        target_logits[rows] scratch_ptr scale_bits
    """,
}
"""The arguments of each operation. The sizes in an array's shape are fields of the record too; an
array with a single size may have any shape of so many elements."""

SHAPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    name: {array: tuple(sizes.split(",")) for array, sizes in re.findall(r"(\w+)\[(\S+)\]", fields)}
    for name, fields in _OPERATIONS.items()
}
"""The names of the sizes of each operation's arrays."""
RECORDS: Mapping[str, np.dtype] = {
    name: record_dtype(
        " ".join(
            [
                *COMMON_FIELDS,
                *re.sub(r"\[\S+\]", "_ptr", fields).split(),
                *dict.fromkeys(size for shape in SHAPES[name].values() for size in shape),
            ]
        )
    )
    for name, fields in _OPERATIONS.items()
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
    "calls": INT64,
    "key": (np.dtype(np.uint64),),
}
"""Types of the arrays by name."""

RUN_CALLS = "run_calls"
"""The entry, whose record has the calls [count, 2]: the number of an operation in OPERATIONS, and
the address of its record."""
OPERATIONS = tuple(name for name in RECORDS if name != RUN_CALLS)
CALLS_PER_RUN = 64
"""Most calls of a run of the threads."""
MAX_PHASES = 3
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
