"""The arguments of a compiled step: a record of integers, and one for each linear layer.

Compiled code sees memory only through these records. A name that ends in `_ptr` is an address, one
that ends in `_bytes` a size or a stride in bytes, and every other one a count or a number.
`backend.py` writes them: once for the weights and the buffers, and in each step for the batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanovllm.model.activation import GATES
from nanovllm.model.kernels.build.layout import WORD_BYTES

_COUNTS = """
    threads layers d_model d_ff heads kv_heads sharing head_dim queries_width vocab max_positions
    window chunk_tokens activation is_rms embedding_is_bfloat16
    block_size block_columns head_columns key_steps blocks max_blocks
    tokens seqs rows decodes chunks is_refused steps
"""
_BYTES = """
    hidden_stride qkv_stride attn_out_stride ffn_hidden_stride inputs_stride logits_stride
    query_stride embedding_stride key_block value_block
    scratch scores queries row wide
"""
_ARRAYS = """
    token_ids positions slots query_starts context_lens logit_rows block_tables
    decode_items chunk_items drafted
    token_embedding position_embedding rotary epsilon attention_scales query_gain key_gain
    attention_gain attention_bias ffn_gain ffn_bias final_gain final_bias
    linears
    keys values key_scales value_scales
    hidden qkv attn_out ffn_hidden inputs row_quant final logits best argmax_tokens
    scratch scores queries row wide
"""


def record_dtype(fields: str) -> np.dtype[Any]:
    """Return the type of a record of 64-bit integers with these fields."""
    return np.dtype([(name, np.int64) for name in fields.split()])


def _with_suffix(names: str, suffix: str) -> str:
    return " ".join(name + suffix for name in names.split())


STEP_RECORD = record_dtype(
    f"{_COUNTS} {_with_suffix(_BYTES, '_bytes')} {_with_suffix(_ARRAYS, '_ptr')} job_ptr phases_ptr"
)
"""The record of a step.

A head of keys and values is shared by `sharing` of the `heads` query heads. `chunk_tokens` are the
most tokens of an item of prefill, and `window` is how many keys a token sees. `rotary` has a row of
`head_dim` cosines and sines for each position. `position_embedding`, `rotary`, `query_gain` and
`key_gain` are 0 in networks without them.

A run of `steps` steps writes the tokens of each to `drafted` [steps][rows] (steps.py).

`scratch`, `scores`, `queries`, `row` and `wide` are working memory; `*_bytes` is each thread's part
of it. `wide` is a widened piece of a panel (matmul.py). `inputs` are the input rows of a linear
layer, and `row_quant` is their quantization where they are int8 (convert.py). `best` is memory of
head.py.
"""
LINEAR_RECORD = record_dtype(
    """
    steps panels weight_ptr bias_ptr
    column_scales_ptr column_sums_ptr input_factors_ptr
    outliers outlier_columns_ptr outlier_factors_ptr outlier_weight_ptr
    """
)
"""The record of a linear layer, whose weight has `steps` words down each of `panels` panels.

int8 weights have a float32 scale and an int32 sum for each column (epilogue.py) and a float32
factor for each input (convert.py). `outliers` inputs stay float32: `outlier_columns` says which
(int32), `outlier_factors` has a float32 and `outlier_weight` a row of float32 for each.
"""

_INT64_ARRAYS = """
    token_ids positions slots query_starts context_lens logit_rows block_tables
    decode_items chunk_items argmax_tokens drafted
"""
FLOAT32: tuple[np.dtype[Any], ...] = (np.dtype(np.float32),)
INT64: tuple[np.dtype[Any], ...] = (np.dtype(np.int64),)
STEP_DTYPES: Mapping[str, tuple[np.dtype[Any], ...]] = {
    **dict.fromkeys(_ARRAYS.split(), FLOAT32),
    **dict.fromkeys(_INT64_ARRAYS.split(), INT64),
    "linears": (LINEAR_RECORD,),
    "token_embedding": (np.dtype(np.float32), np.dtype(np.uint16)),
}
"""Types of a step's arrays. Float32 memory may hold narrower numbers, packed into 32-bit words."""

LINEARS_PER_LAYER = 4
QKV, ATTENTION_OUT, UP, DOWN = range(LINEARS_PER_LAYER)
"""The linear layers of a block, in the order of their records; the head comes after all blocks."""

ROW_QUANT_BYTES = 128
"""Bytes of a row's quantization (convert.py): 32 words."""
ROW_QUANT_OUTLIERS = 16
"""Index of the word where a row's outliers begin."""
OUTLIER_WORDS = ROW_QUANT_BYTES // WORD_BYTES - ROW_QUANT_OUTLIERS
"""Most outliers that a row's quantization holds."""
ITEM_FIELDS = 4
"""Integers of an item of attention: sequence, first token, number of tokens, first position."""
PREFILL_QUERIES = 24
"""Most queries in an item of prefill, of all heads that share keys and values: their scores over a
whole context fit a core's own cache."""
PIECE_WORDS = 768
"""Words of each column of a panel that a matmul multiplies before it goes on: 192 KiB with AVX-512,
else 48 KiB, so that the rows and the next piece fit the second-level cache too."""
MAX_PHASES_PER_LAYER = 10
"""Most phases (phase.py) of a block: one for each operation, int8 conversions among them."""
MAX_PHASES_PER_STEP = 8
"""Most phases of a step outside its blocks."""
MAX_STEPS = 8
"""Most steps of a run (steps.py)."""

ACTIVATION_NAMES = (
    "gelu_new",
    "gelu",
    "quick_gelu",
    "silu",
    "sigmoid",
    "tanh",
    "mish",
    "relu",
    "relu2",
    "relu6",
    "leaky_relu",
    "linear",
)
"""An epilogue (epilogue.py) is a number: the index of an activation, or one of the next ones."""
STORE = len(ACTIVATION_NAMES)
RESIDUAL = STORE + 1
GATED = RESIDUAL + 1
"""The first of the gates, one for each of GATES."""
NUM_EPILOGUES = GATED + len(GATES)

NO_TOKEN = -1
"""The argmax of a row that has none."""


def best_bytes(lanes: int) -> int:
    """Return the bytes of the argmax for a row and a thread: a vector of scores, one of tokens."""
    return 2 * lanes * WORD_BYTES
