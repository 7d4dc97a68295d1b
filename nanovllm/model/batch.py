"""ForwardBatch: the input of a forward pass, as flat arrays without padding.

Decoding a token, prefilling a prompt and prefilling a chunk of it differ only in their number of
queries; one batch may mix them. The layout is that of ragged ("varlen") attention: sequence s owns
tokens query_starts[s] to query_starts[s + 1].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tokens to compute, their positions, and where their keys and values are stored.

    Attributes:
        token_ids: the new tokens of every sequence, one sequence after the other.
        positions: each token's position in its sequence, from 0.
        query_starts: index of each sequence's first token, and the number of tokens at the end.
        context_lens: tokens of each sequence in the cache after this batch.
        block_tables: block ids of each sequence in order; entries past the context are not read.
        slots: where each token's key and value are stored: block id * block_size + offset.
        logit_rows: tokens whose final hidden state is returned.
    """

    token_ids: Int64[np.ndarray, " tokens"]
    positions: Int64[np.ndarray, " tokens"]
    query_starts: Int64[np.ndarray, " seqs_and_one"]
    context_lens: Int64[np.ndarray, " seqs"]
    block_tables: Int64[np.ndarray, "seqs max_blocks"]
    slots: Int64[np.ndarray, " tokens"]
    logit_rows: Int64[np.ndarray, " rows"]

    @classmethod
    def single(
        cls, token_ids: Sequence[int] | np.ndarray, *, start: int = 0, all_rows: bool = False
    ) -> "ForwardBatch":
        """Return a batch of one sequence, whose whole context is in block 0 of the cache.

        Args:
            token_ids: the tokens to compute.
            start: the position of the first; the keys and values before it are in the cache.
            all_rows: return the hidden state of every token, not of the last alone.
        """
        tokens = np.array(token_ids, dtype=np.int64)
        count = len(tokens)
        positions = np.arange(start, start + count, dtype=np.int64)
        return cls(
            token_ids=tokens,
            positions=positions,
            query_starts=np.array([0, count], dtype=np.int64),
            context_lens=np.array([start + count], dtype=np.int64),
            block_tables=np.zeros((1, 1), dtype=np.int64),
            slots=positions,
            logit_rows=np.arange(0 if all_rows else count - 1, count, dtype=np.int64),
        )

    def one_token_batches(self) -> Iterator["ForwardBatch"]:
        """Return the same computation as a batch for each token."""
        sequences = np.repeat(np.arange(self.seqs, dtype=np.int64), np.diff(self.query_starts))
        is_returned = np.isin(np.arange(self.tokens, dtype=np.int64), self.logit_rows)
        for token, seq in enumerate(sequences.tolist()):
            one = slice(token, token + 1)
            yield ForwardBatch(
                token_ids=self.token_ids[one],
                positions=self.positions[one],
                query_starts=np.array([0, 1], dtype=np.int64),
                context_lens=self.positions[one] + 1,
                block_tables=self.block_tables[seq : seq + 1],
                slots=self.slots[one],
                logit_rows=np.flatnonzero(is_returned[one]),
            )

    def following(self, token_ids: Int64[np.ndarray, " seqs"], block_size: int) -> "ForwardBatch":
        """Return the batch that computes one more token of each sequence, after this batch.

        The block tables already have the blocks of these tokens.
        """
        sequences = np.arange(self.seqs, dtype=np.int64)
        positions = self.context_lens
        blocks = self.block_tables[sequences, positions // block_size]
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            query_starts=np.arange(self.seqs + 1, dtype=np.int64),
            context_lens=positions + 1,
            block_tables=self.block_tables,
            slots=blocks * block_size + positions % block_size,
            logit_rows=sequences,
        )

    @property
    def tokens(self) -> int:
        """Number of tokens to compute."""
        return int(self.token_ids.shape[0])

    @property
    def seqs(self) -> int:
        """Number of sequences."""
        return int(self.context_lens.shape[0])

    def check_lengths(self) -> None:
        """Raise ValueError unless the arrays agree about the number of tokens and sequences."""
        same_tokens = len(self.positions) == len(self.slots) == self.tokens
        if (
            not same_tokens
            or len(self.query_starts) != self.seqs + 1
            or len(self.block_tables) != self.seqs
        ):
            raise ValueError(
                "the arrays of a batch disagree about the number of tokens or sequences"
            )

    def check(self, *, vocab: int, max_positions: int, blocks: int, block_size: int) -> None:
        """Raise ValueError unless every index is inside the model and the cache.

        After it no kernel can read or write outside its arrays.
        """
        self.check_lengths()
        counts = np.diff(self.query_starts)
        if (
            self.seqs == 0
            or self.query_starts[0] != 0
            or self.query_starts[-1] != self.tokens
            or counts.min() < 1
        ):
            raise ValueError("a batch needs at least one sequence and at least one token in each")
        _check_inside("token_ids", self.token_ids, vocab)
        _check_inside("positions", self.positions, max_positions)
        _check_inside("slots", self.slots, blocks * block_size)
        _check_inside("logit_rows", self.logit_rows, self.tokens)
        if (
            self.context_lens.max() > self.block_tables.shape[1] * block_size
            or (self.context_lens < counts).any()
        ):
            raise ValueError(
                "a context is longer than its block table, or shorter than its new tokens"
            )
        first_tokens = np.arange(self.block_tables.shape[1], dtype=np.int64) * block_size
        is_read = first_tokens < self.context_lens[:, None]
        _check_inside("block_tables", self.block_tables[is_read], blocks)
        sequence = np.repeat(np.arange(self.seqs, dtype=np.int64), counts)
        offset = np.arange(self.tokens, dtype=np.int64) - self.query_starts[:-1][sequence]
        if not np.array_equal(self.positions, (self.context_lens - counts)[sequence] + offset):
            raise ValueError("positions do not run up to the end of each context")
        own_block = self.block_tables[sequence, self.positions // block_size]
        if not np.array_equal(self.slots, own_block * block_size + self.positions % block_size):
            raise ValueError("slots do not lie in the blocks of their own sequences")


def _check_inside(name: str, values: np.ndarray, limit: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= limit):
        raise ValueError(
            f"{name} run from {values.min()} to {values.max()}, outside 0 to {limit - 1}"
        )
