"""Keys and values of every token so far, in blocks that any sequence may own (PagedAttention, Kwon et al. 2023, arXiv:2309.06180).

    keys, values  [layers, blocks, block_size, heads, head_dim]

Block ids come from outside (the engine's block manager); here is only memory. A freed block keeps its old contents, so a slot that
no token of the sequence was written to must never be read.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64


@dataclass(frozen=True, slots=True)
class KVCache:
    """Two arrays and the way through a block table."""

    keys: Float32[np.ndarray, "layers blocks block_size heads head_dim"]
    values: Float32[np.ndarray, "layers blocks block_size heads head_dim"]

    @classmethod
    def allocate(
        cls, *, layers: int, blocks: int, block_size: int, heads: int, head_dim: int
    ) -> "KVCache":
        """An empty cache; the operating system hands out its memory when it is first written to."""
        shape = (layers, blocks, block_size, heads, head_dim)
        return cls(np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return int(self.keys.shape[2])

    def write(
        self,
        layer: int,
        slots: Int64[np.ndarray, " tokens"],
        keys: Float32[np.ndarray, "tokens heads head_dim"],
        values: Float32[np.ndarray, "tokens heads head_dim"],
    ) -> None:
        """Store one key and one value a token at its slot (block id * block_size + offset)."""
        block, offset = np.divmod(slots, self.block_size)
        self.keys[layer, block, offset] = keys
        self.values[layer, block, offset] = values

    def gather(
        self, layer: int, block_table: Int64[np.ndarray, " max_blocks"], context_len: int
    ) -> tuple[
        Float32[np.ndarray, "context heads head_dim"], Float32[np.ndarray, "context heads head_dim"]
    ]:
        """One sequence's keys and values in order, exactly `context_len` of them; a view where its blocks lie side by side."""
        used = block_table[: -(-context_len // self.block_size)]
        first, count = int(used[0]), len(used)
        in_a_row = int(used[-1]) - first == count - 1 and bool((used[1:] - used[:-1] == 1).all())
        where = slice(first, first + count) if in_a_row else used
        keys, values = self.keys[layer, where], self.values[layer, where]
        flat = (count * self.block_size, *keys.shape[2:])
        return keys.reshape(flat)[:context_len], values.reshape(flat)[:context_len]
