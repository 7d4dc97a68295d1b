"""The preparation of a step: check its batch and divide its attention into items.

The check is that of ForwardBatch.check, in 1 us instead of 40: all indices lie inside the model and
the cache, and positions and slots are those of the sequences. ForwardBatch.check then says what is
wrong. Items of attention are ITEM_FIELDS integers:

    | sequence | first token in the batch | number of tokens | position of the first token |

Sequences with one new token are in `decode_items`. The others are in `chunk_items`, in chunks of up
to `chunk_tokens` tokens, which have PREFILL_QUERIES queries or fewer.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.build.layout import INT_BYTES
from nanovllm.model.kernels.simd.memory import load_int, step_record_at, store_int
from nanovllm.model.kernels.step_record import ITEM_FIELDS


@compiled
def prepare_attention(record_ptr: int, _: int) -> None:
    """Check the batch of the record at `record_ptr`; write `is_refused` and the items."""
    record = step_record_at(record_ptr)
    record.is_refused = 0 if _divide(record) else 1


@compiled
def _divide(record: Any) -> bool:
    """Write the items; return whether the batch is valid."""
    record.decodes = record.chunks = 0
    end = 0
    for sequence in range(record.seqs):
        start = load_int(record.query_starts_ptr, sequence)
        end = load_int(record.query_starts_ptr, sequence + 1)
        if (
            (sequence == 0 and start != 0)
            or end <= start
            or end > record.tokens
            or not _is_sound(record, sequence, start, end - start)
        ):
            return False
        _add_items(record, sequence, start, end - start)
    for row in range(record.rows):
        if not 0 <= load_int(record.logit_rows_ptr, row) < record.tokens:
            return False
    return bool(record.seqs > 0 and end == record.tokens)


@compiled
def _is_sound(record: Any, sequence: int, start: int, count: int) -> bool:
    """Return whether a sequence's context, block table, positions, slots and tokens are valid."""
    context = load_int(record.context_lens_ptr, sequence)
    capacity = min(record.max_positions, record.max_blocks * record.block_size)
    if context < count or context > capacity:
        return False
    table_ptr = record.block_tables_ptr + sequence * record.max_blocks * INT_BYTES
    for index in range((context + record.block_size - 1) // record.block_size):
        if not 0 <= load_int(table_ptr, index) < record.blocks:
            return False
    for token in range(start, start + count):
        position = context - count + token - start
        block_id = load_int(table_ptr, position // record.block_size)
        slot = block_id * record.block_size + position % record.block_size
        if (
            load_int(record.positions_ptr, token) != position
            or load_int(record.slots_ptr, token) != slot
            or not 0 <= load_int(record.token_ids_ptr, token) < record.vocab
        ):
            return False
    return True


@compiled
def _add_items(record: Any, sequence: int, start: int, count: int) -> None:
    """Add the items of a sequence whose `count` new tokens begin at `start` in the batch."""
    first = load_int(record.context_lens_ptr, sequence) - count
    if count == 1:
        _store_item(record.decode_items_ptr, record.decodes, sequence, start, 1, first)
        record.decodes += 1
        return
    for done in range(0, count, record.chunk_tokens):
        tokens = min(record.chunk_tokens, count - done)
        _store_item(
            record.chunk_items_ptr, record.chunks, sequence, start + done, tokens, first + done
        )
        record.chunks += 1


@compiled
def _store_item(
    items_ptr: int, number: int, sequence: int, token: int, count: int, position: int
) -> None:
    item_ptr = items_ptr + number * ITEM_FIELDS * INT_BYTES
    store_int(item_ptr, 0, sequence)
    store_int(item_ptr, 1, token)
    store_int(item_ptr, 2, count)
    store_int(item_ptr, 3, position)
