"""ForwardBatches made by hand, for tests of the model that run without an engine."""

from collections.abc import Sequence

import numpy as np

from nanovllm.model.batch import ForwardBatch


def make_batch(
    seqs: Sequence[Sequence[int] | np.ndarray],
    *,
    block_size: int,
    computed: Sequence[int] | None = None,
    block_tables: Sequence[Sequence[int]] | None = None,
    all_rows: bool = False,
) -> ForwardBatch:
    """One step over whole sequences, of each of which `computed` tokens are in the cache already.

    Args:
        seqs: all tokens of each sequence up to the end of this step.
        block_tables: the blocks of each; by default they follow one another from 0.
        all_rows: ask for every token's hidden state and not just for each sequence's last.
    """
    starts = list(computed or [0] * len(seqs))
    lengths = [len(seq) for seq in seqs]
    tables = (
        [list(table) for table in block_tables]
        if block_tables is not None
        else _tables_in_a_row(lengths, block_size)
    )
    widest = max(len(table) for table in tables)
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    positions = [
        np.arange(start, length, dtype=np.int64)
        for start, length in zip(starts, lengths, strict=True)
    ]
    slots = [
        np.asarray(table, dtype=np.int64)[place // block_size] * block_size + place % block_size
        for table, place in zip(tables, positions, strict=True)
    ]
    query_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return ForwardBatch(
        token_ids=np.concatenate(
            [
                np.asarray(seq[start:], dtype=np.int64)
                for seq, start in zip(seqs, starts, strict=True)
            ]
        ),
        positions=np.concatenate(positions),
        query_starts=query_starts,
        context_lens=np.asarray(lengths, dtype=np.int64),
        block_tables=np.asarray(
            [table + [0] * (widest - len(table)) for table in tables], dtype=np.int64
        ),
        slots=np.concatenate(slots),
        logit_rows=np.arange(query_starts[-1], dtype=np.int64)
        if all_rows
        else query_starts[1:] - 1,
    )


def _tables_in_a_row(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    tables, first = [], 0
    for length in lengths:
        blocks = -(-length // block_size)
        tables.append(list(range(first, first + blocks)))
        first += blocks
    return tables
