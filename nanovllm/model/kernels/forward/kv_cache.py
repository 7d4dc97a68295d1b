"""Keys and values in the paged KV cache: the twin of nanovllm/model/kv_cache.py.

A block of the cache holds `block_size` tokens. Its keys and its values are packed panels, so that
both matmuls of attention read them as a weight is read (matmul.py):

    keys    [layers, blocks, kv_heads][key_steps][block_columns]   a key is a column
    values  [layers, blocks, kv_heads][value_steps][head_columns]  a value is a row

An entry is a word of 32 bits (formats.py): one float32, or two bfloat16 or four int8 that stand
below each other. key_steps and value_steps are head_dim and block_size divided by the numbers in a
word; block_columns and head_columns are padded to whole vectors. An int8 key or value has a float32
scale, in key_scales and value_scales [layers, blocks, kv_heads][block_columns].
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.target import PER_WORD, Spec
from nanovllm.model.kernels.forward.convert import make_convert_kv, make_pack_value_row
from nanovllm.model.kernels.forward.rotary import make_turn_heads
from nanovllm.model.kernels.simd.memory import load_int, make_scatter
from nanovllm.model.kernels.threads.phase import make_phase


@compiled
def block_index(record: Any, layer: int, block_id: int) -> int:
    """Return the index of a block's first head in [layers, blocks, kv_heads]."""
    return (layer * record.blocks + block_id) * record.kv_heads


def make_store(spec: Spec) -> Any:
    """Return store_keys_and_values(record, thread, phase, layer) -> next phase.

    It writes each token's key and value to its slot. Before, rotary positions turn the key and the
    queries that share it, in their rows. An item is a group of heads: values that share a word are
    written by one thread, in the order of their tokens.
    """
    convert_kv, scatter = make_convert_kv(spec.target, spec.cache), make_scatter(spec.target)
    per_word = PER_WORD[spec.cache]
    pack_value_row = make_pack_value_row(spec.target, per_word)
    turn_heads = make_turn_heads(spec.target)

    @compiled
    def count_groups(record: Any, _layer: int) -> int:
        return min(record.kv_heads, 2 * record.threads)

    @compiled
    def store_heads(record: Any, thread: int, group: int, layer: int) -> None:
        row_ptr = record.row_ptr + thread * record.row_bytes
        groups = count_groups(record, layer)
        first_head = record.kv_heads * group // groups
        end_head = record.kv_heads * (group + 1) // groups
        for token in range(record.tokens):
            slot = load_int(record.slots_ptr, token)
            block = block_index(record, layer, slot // record.block_size)
            token_ptr = record.qkv_ptr + token * record.qkv_stride_bytes
            keys_ptr = token_ptr + record.queries_width * WORD_BYTES
            for head in range(first_head, end_head):
                turn_heads(record, layer, token, head)
                key_ptr = keys_ptr + head * record.head_dim * WORD_BYTES
                store_head(record, row_ptr, key_ptr, block + head, slot % record.block_size)

    @compiled
    def store_head(record: Any, row_ptr: int, key_ptr: int, index: int, offset: int) -> None:
        """Write one head's key and value to an offset in a block; `row_ptr` is working memory."""
        scale_bytes = (index * record.block_columns + offset) * WORD_BYTES
        convert_kv(key_ptr, record.head_dim, row_ptr, record.key_scales_ptr + scale_bytes)
        column_ptr = record.keys_ptr + index * record.key_block_bytes + offset * WORD_BYTES
        scatter(row_ptr, column_ptr, record.block_columns * WORD_BYTES, record.key_steps)

        value_ptr = key_ptr + record.kv_heads * record.head_dim * WORD_BYTES
        convert_kv(value_ptr, record.head_dim, row_ptr, record.value_scales_ptr + scale_bytes)
        step_bytes = offset // per_word * record.head_columns * WORD_BYTES
        words_ptr = record.values_ptr + index * record.value_block_bytes + step_bytes
        pack_value_row(row_ptr, words_ptr, offset % per_word, record.head_columns)

    return make_phase(count_groups, store_heads)
