"""Keys and values of all computed tokens, in blocks that any sequence may own (PagedAttention,
Kwon et al. 2023, arXiv:2309.06180).

    keys, values  [layers, blocks, block_size, kv_heads, head_dim]

The engine's block manager hands out block ids; this file is only memory. A freed block keeps its
old contents, so a slot is read only after its sequence has written to it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """Two arrays, read and written through block tables and slots."""

    keys: Float32[np.ndarray, "layers blocks block_size kv_heads head_dim"]
    values: Float32[np.ndarray, "layers blocks block_size kv_heads head_dim"]

    @classmethod
    def allocate(cls, config: ModelConfig, *, blocks: int, block_size: int) -> "KVCache":
        """Return an empty cache; its memory becomes resident when it is first written to."""
        shape = (config.layers, blocks, block_size, config.kv_heads, config.head_dim)
        return cls(np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return int(self.keys.shape[2])

    def write(
        self,
        layer: int,
        slots: Int64[np.ndarray, " tokens"],
        keys: Float32[np.ndarray, "tokens kv_heads head_dim"],
        values: Float32[np.ndarray, "tokens kv_heads head_dim"],
    ) -> None:
        """Store each token's key and value at its slot (block id * block_size + offset)."""
        blocks, offsets = np.divmod(slots, self.block_size)
        self.keys[layer, blocks, offsets] = keys
        self.values[layer, blocks, offsets] = values

    def gather(
        self, layer: int, block_table: Int64[np.ndarray, " max_blocks"], context_len: int
    ) -> tuple[
        Float32[np.ndarray, "context kv_heads head_dim"],
        Float32[np.ndarray, "context kv_heads head_dim"],
    ]:
        """Return the keys and values of one sequence's `context_len` tokens, in order.

        They are views where the sequence's blocks are consecutive, otherwise copies.
        """
        used = block_table[: -(-context_len // self.block_size)]
        first, count = int(used[0]), len(used)
        consecutive = np.array_equal(used, np.arange(first, first + count, dtype=np.int64))
        blocks = slice(first, first + count) if consecutive else used
        # [blocks, block_size, heads, head_dim] -> [blocks * block_size, kv_heads, head_dim]
        flat = (count * self.block_size, *self.keys.shape[3:])
        keys, values = (
            self.keys[layer, blocks].reshape(flat),
            self.values[layer, blocks].reshape(flat),
        )
        return keys[:context_len], values[:context_len]
