"""What a compiled step is given: one record of sizes, strides and addresses, and one for each linear layer.

Compiled code sees memory only through these records. Sizes count elements, strides and `*_bytes` count bytes, every other name is an
address. `nanovllm/model/kernels/backend.py` fills them: once for the weights and the buffers, and in each step for the batch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

_SIZES = """
    threads layers d_model d_ff heads head_dim vocab embedding_is_narrow
    block_size block_columns head_columns key_steps blocks max_blocks max_positions
    tokens seqs rows decodes chunks refused
"""
_BYTES = """
    hidden_stride qkv_stride middle_stride input_stride logits_stride query_stride
    embedding_bytes key_bytes value_bytes scratch_bytes scores_bytes queries_bytes row_bytes
"""
_ADDRESSES = """
    token_ids positions slots query_starts context_lens logit_rows block_tables decode_items chunk_items
    token_embedding position_embedding epsilon scales
    attention_gain attention_bias ffn_gain ffn_bias final_gain final_bias
    linears
    keys values key_scales value_scales
    hidden qkv mixed middle inputs input_notes final logits best words
    scratch scores queries row
    job phases
"""

PARAMETERS = np.dtype([(name, np.int64) for name in f"{_SIZES} {_BYTES} {_ADDRESSES}".split()])

_INTEGERS = """
    token_ids positions slots query_starts context_lens logit_rows block_tables decode_items chunk_items
    words work
"""
_LINEAR = """
    steps panels weight bias finish
    column_scales column_sums input_factors
    outliers outlier_places outlier_factors outlier_weight
"""
LINEAR = np.dtype([(name, np.int64) for name in _LINEAR.split()])
"""A product: `steps` words down each of `panels` panels; `finish` is the number of what its epilogue does.

For bytes also a float32 and an int32 a column (epilogue.py), a float32 an input (convert.py), and `outliers` inputs that stay float32: their
places as int32, and a float32 and a row of float32 weights for each.
"""
FLOAT32: tuple[np.dtype[Any], ...] = (np.dtype(np.float32),)
INT64: tuple[np.dtype[Any], ...] = (np.dtype(np.int64),)
DTYPES: Mapping[str, tuple[np.dtype[Any], ...]] = {
    **dict.fromkeys(_INTEGERS.split(), INT64),
    "linears": (LINEAR,),
    "token_embedding": (np.dtype(np.float32), np.dtype(np.uint16)),
}
"""Types of the arrays at the addresses of PARAMETERS; those not listed are FLOAT32, whose bits may be anything."""
LINEARS_PER_LAYER = 4
"""Records of a layer, in this order; the head comes after all layers."""
QKV, ATTENTION_OUT, UP, DOWN = range(LINEARS_PER_LAYER)

WORD_BYTES = 4
NOTES_BYTES = 128
"""What is kept of a row of bytes beside it, see convert.py; outliers begin at number OUTLIER_NOTES."""
OUTLIER_NOTES = 16
MAX_OUTLIERS = NOTES_BYTES // WORD_BYTES - OUTLIER_NOTES
ITEM_FIELDS = 4
"""Attention is handed out in items of four integers: row of the block table, first token of the batch, tokens, position of the first."""
QUERY_TILE = 24
"""Queries of a prompt in one item: their scores over a whole context fit a core's own cache."""
ROW_BLOCK = 96
"""Rows of a product taken together: they stay in a core's own cache while a panel passes by."""
ATTENTION_PHASES, FEED_FORWARD_PHASES = 6, 4
PHASES_PER_LAYER = ATTENTION_PHASES + FEED_FORWARD_PHASES
"""Phases of a layer at most (barrier.py), each used once in a step."""
PHASES_PER_STEP = 4
"""Phases of a step outside its layers, at most."""

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
"""What an epilogue does is numbered: these activations first, then the next two."""
STORE = len(ACTIVATION_NAMES)
ADD_TO_RESIDUAL = STORE + 1

NO_WORD = -1
"""Instead of the most likely word of a row that has none."""


def best_bytes(lanes: int) -> int:
    """Memory of argmax.py for one row of one thread: a vector of values and a vector of words."""
    return 2 * lanes * WORD_BYTES
