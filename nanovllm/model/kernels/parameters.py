"""What a compiled step is given: one record of sizes, strides and addresses.

Compiled code sees memory only through this record. Sizes count elements, strides and `*_bytes` count bytes, every other name is an
address. `nanovllm/model/numba_backend.py` fills it: once for the weights and the buffers, and in each step for the batch.
"""

import numpy as np

_SIZES = """
    threads layers d_model d_ff heads head_dim vocab activation
    block_size block_columns head_columns blocks max_blocks
    tokens rows decodes chunks
"""
_BYTES = """
    hidden_stride qkv_stride middle_stride logits_stride
    key_bytes value_bytes scratch_bytes scores_bytes
"""
_ADDRESSES = """
    token_ids positions slots logit_rows block_tables decode_items chunk_items
    token_embedding position_embedding zeros epsilon scales
    attention_gain attention_bias qkv_weight qkv_bias out_weight out_bias
    ffn_gain ffn_bias up_weight up_bias down_weight down_bias
    final_gain final_bias head_weight
    keys values
    hidden normed qkv mixed middle logits scratch scores
    arrived work
"""

PARAMETERS = np.dtype([(name, np.int64) for name in f"{_SIZES} {_BYTES} {_ADDRESSES}".split()])

ITEM_FIELDS = 4
"""Attention is handed out in items of four integers: row of the block table, first token of the batch, tokens, position of the first."""
QUERY_TILE = 24
"""Queries of a prompt in one item: their scores over a whole context fit a core's own cache."""
ROW_BLOCK = 96
"""Rows of a product taken together: they stay in a core's own cache while a panel passes by."""
WORK_COUNTERS_PER_LAYER = 6
"""Counters that hand out work, each used once in a step: four products, two kinds of attention."""

ACTIVATION_NAMES = ("gelu_new", "gelu", "quick_gelu", "silu", "sigmoid", "tanh", "mish", "relu", "relu2", "relu6", "leaky_relu", "linear")
"""What an epilogue does is numbered: these activations first, then the next two."""
STORE = len(ACTIVATION_NAMES)
ADD_TO_RESIDUAL = STORE + 1
