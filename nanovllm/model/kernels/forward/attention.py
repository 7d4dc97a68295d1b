"""Causal attention over the paged KV cache: the twin of nanovllm/model/attention.py.

    scores  = scale * Q K^T
    weights = exp(scores - max(scores))
    output  = weights V / sum(weights)

A block of the cache is a packed panel (kv_cache.py), so Q K^T and weights V are matmuls like those
of matmul.py, block after block (attend.py). In decode one query is computed in several heads, in
prefill up to PREFILL_QUERIES queries in one head. Query heads that share keys and values are
computed together, as further queries, in decode too; so are those of a query that does not see all
tokens before it. Either way a score is a sum over head_dim in
order, and an output a sum over the tokens in order, so both give the same bits.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.build.target import Spec
from nanovllm.model.kernels.forward.attend import Item, make_attend
from nanovllm.model.kernels.simd.memory import load_int
from nanovllm.model.kernels.step_record import ITEM_FIELDS
from nanovllm.model.kernels.threads.phase import make_phase


def make_paged_attention(spec: Spec) -> Any:
    """Return paged_attention(record, thread, phase, layer) -> next phase.

    attn_out = attention of every token to its own sequence. The items of prepare.py are subdivided:
    a prefill item is one item for each head, and each of the last decode items is one for each
    group of heads, so that no thread waits long for another one at the end.
    """
    attend_heads = make_attend(spec, is_decode=True)
    attend_queries = make_attend(spec, is_decode=False)

    @compiled
    def count_groups(record: Any) -> tuple[int, int]:
        """Return the number of decode items that stay whole, and the groups of the others."""
        return max(0, record.decodes - 2 * record.threads), min(record.threads, record.kv_heads)

    @compiled
    def count_items(record: Any, _layer: int) -> int:
        undivided, groups = count_groups(record)
        decode_items = undivided + (record.decodes - undivided) * groups
        return int(decode_items + record.chunks * record.kv_heads)

    @compiled
    def attend(record: Any, thread: int, item: int, layer: int) -> None:
        heads, (undivided, groups) = record.kv_heads, count_groups(record)
        if item < undivided:
            decode(record, thread, layer, item, 0, heads)
            return
        sequence, group = undivided + (item - undivided) // groups, (item - undivided) % groups
        if sequence < record.decodes:
            first_head = heads * group // groups
            end_head = heads * (group + 1) // groups
            decode(record, thread, layer, sequence, first_head, end_head - first_head)
        else:
            item -= undivided + (record.decodes - undivided) * groups
            prefill(record, thread, layer, item // heads, item % heads)

    @compiled
    def decode(
        record: Any, thread: int, layer: int, number: int, first_head: int, heads: int
    ) -> None:
        """Compute some heads of decode item `number`."""
        sequence, token, _, position = read_item(record.decode_items_ptr, number)
        table_ptr, visible = see(record, sequence, position, 1)
        query_ptr = record.qkv_ptr + token * record.qkv_stride_bytes
        out_ptr = record.attn_out_ptr + token * record.attn_out_stride_bytes
        if record.sharing == 1 and position < record.window:
            item = Item(layer, first_head, heads, table_ptr, visible)
            attend_heads(record, thread, item, query_ptr, out_ptr)
            return
        for head in range(first_head, first_head + heads):
            item = Item(layer, head, record.sharing, table_ptr, visible)
            attend_queries(record, thread, item, query_ptr, out_ptr)

    @compiled
    def prefill(record: Any, thread: int, layer: int, number: int, head: int) -> None:
        """Compute one head of prefill item `number`."""
        sequence, token, queries, position = read_item(record.chunk_items_ptr, number)
        table_ptr, visible = see(record, sequence, position, queries)
        query_ptr = record.qkv_ptr + token * record.qkv_stride_bytes
        out_ptr = record.attn_out_ptr + token * record.attn_out_stride_bytes
        item = Item(layer, head, queries * record.sharing, table_ptr, visible)
        attend_queries(record, thread, item, query_ptr, out_ptr)

    @compiled
    def see(record: Any, sequence: int, position: int, tokens: int) -> tuple[int, int]:
        """Return the first block that `tokens` tokens see, and the keys from it to the last."""
        table_ptr = record.block_tables_ptr + sequence * record.max_blocks * INT_BYTES
        first_block = max(0, position + 1 - record.window) // record.block_size
        visible = position + tokens - first_block * record.block_size
        return table_ptr + first_block * INT_BYTES, visible

    @compiled
    def read_item(items_ptr: int, number: int) -> tuple[int, int, int, int]:
        """Return sequence, first token, number of tokens and first position."""
        item_ptr = items_ptr + number * ITEM_FIELDS * INT_BYTES
        return (
            load_int(item_ptr, 0),
            load_int(item_ptr, 1),
            load_int(item_ptr, 2),
            load_int(item_ptr, 3),
        )

    return make_phase(count_items, attend)
