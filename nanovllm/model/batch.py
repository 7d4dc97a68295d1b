"""ForwardBatch: what one forward pass computes, as flat arrays without padding.

Decoding one token, reading a prompt and reading a piece of it are the same thing with different numbers of queries; one batch may
mix them. The layout is that of ragged ("varlen") attention: sequence s owns tokens query_starts[s] to query_starts[s + 1].
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Tokens to compute, where they stand, and where their keys and values live.

    Attributes:
        token_ids: every sequence's new tokens, one sequence after the other.
        positions: each token's place in its sequence, from 0.
        query_starts: where each sequence's tokens begin, and the end of the last.
        context_lens: tokens of each sequence in the cache once this batch is computed.
        block_tables: ids of each sequence's cache blocks in order; entries past the context are not read.
        slots: where each token's key and value go: block id * block_size + offset.
        logit_rows: tokens whose final hidden state is wanted.
    """

    token_ids: Int64[np.ndarray, " tokens"]
    positions: Int64[np.ndarray, " tokens"]
    query_starts: Int64[np.ndarray, " seqs_and_one"]
    context_lens: Int64[np.ndarray, " seqs"]
    block_tables: Int64[np.ndarray, "seqs max_blocks"]
    slots: Int64[np.ndarray, " tokens"]
    logit_rows: Int64[np.ndarray, " rows"]

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return int(self.token_ids.shape[0])

    @property
    def seqs(self) -> int:
        """Sequences they belong to."""
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
        """Raise ValueError unless every index lies inside the model and the cache, so that no kernel can read outside them."""
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
