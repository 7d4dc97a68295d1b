"""What precedes a step: the check that its batch is sound, and the cutting up of its attention.

The check is that of ForwardBatch.check, in a microsecond instead of forty: a batch whose indices lie inside the model and the cache, and
whose positions and slots are those that its sequences have. What fails here is told in words there. Attention is handed out in items of
ITEM_FIELDS integers,

    | row of the block table | first token of the batch | tokens | position of the first |

a sequence of one new token each in `decode_items`, pieces of up to QUERY_TILE tokens of the others in `chunk_items`.
"""

from typing import Any

from nanovllm.model.kernels.build.compiler import compiled
from nanovllm.model.kernels.simd.move import INT_BYTES, load_int, step_record_at
from nanovllm.model.kernels.simd.scalar import store_int
from nanovllm.model.kernels.step_record import ITEM_FIELDS, QUERY_TILE


@compiled
def plan_step(address: int, _: int) -> None:
    """Check the batch of the record at `address` and lay out its attention; `refused` says that it is not sound."""
    p = step_record_at(address)
    p.decodes = p.chunks = 0
    p.refused = 1
    end = 0
    for sequence in range(p.seqs):
        start, end = load_int(p.query_starts, sequence), load_int(p.query_starts, sequence + 1)
        if (
            (sequence == 0 and start != 0)
            or end <= start
            or end > p.tokens
            or not _is_sound(p, sequence, start, end - start)
        ):
            return
        _add_items(p, sequence, start, end - start)
    for row in range(p.rows):
        if not 0 <= load_int(p.logit_rows, row) < p.tokens:
            return
    if p.seqs > 0 and end == p.tokens:
        p.refused = 0


@compiled
def _is_sound(p: Any, sequence: int, start: int, count: int) -> bool:
    context = load_int(p.context_lens, sequence)
    if context < count or context > p.max_positions or context > p.max_blocks * p.block_size:
        return False
    table = p.block_tables + sequence * p.max_blocks * INT_BYTES
    for index in range((context + p.block_size - 1) // p.block_size):
        if not 0 <= load_int(table, index) < p.blocks:
            return False
    for token in range(start, start + count):
        position = context - count + token - start
        slot = load_int(table, position // p.block_size) * p.block_size + position % p.block_size
        if (
            load_int(p.positions, token) != position
            or load_int(p.slots, token) != slot
            or not 0 <= load_int(p.token_ids, token) < p.vocab
        ):
            return False
    return True


@compiled
def _add_items(p: Any, sequence: int, start: int, count: int) -> None:
    first = load_int(p.context_lens, sequence) - count
    if count == 1:
        _add_item(p.decode_items, p.decodes, sequence, start, 1, first)
        p.decodes += 1
        return
    for done in range(0, count, QUERY_TILE):
        _add_item(
            p.chunk_items,
            p.chunks,
            sequence,
            start + done,
            min(QUERY_TILE, count - done),
            first + done,
        )
        p.chunks += 1


@compiled
def _add_item(
    items: int, number: int, sequence: int, token: int, count: int, position: int
) -> None:
    at = items + number * ITEM_FIELDS * INT_BYTES
    store_int(at, 0, sequence)
    store_int(at, 1, token)
    store_int(at, 2, count)
    store_int(at, 3, position)
