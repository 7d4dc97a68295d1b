"""Step 8: the KV cache in blocks (PagedAttention, Kwon et al. 2023, arXiv:2309.06180)."""

from array import array
from collections import OrderedDict
from hashlib import blake2b

import numpy as np


def num_blocks_for(tokens: int, block_size: int) -> int:
    """Return the number of blocks that `tokens` tokens need; the last one may be partly full."""
    return -(-tokens // block_size)


def slots(block_ids: list[int], start: int, count: int, block_size: int) -> list[int]:
    """Return where the tokens at the positions `start` to `start + count - 1` are stored.

    The token at position p is in the block `block_ids[p // block_size]`. The slot of a token is
    block id * block_size + offset in the block.
    """
    return [
        block_ids[position // block_size] * block_size + position % block_size
        for position in range(start, start + count)
    ]


def write(pool: np.ndarray, slots: list[int], rows: np.ndarray) -> None:
    """Store each row at its slot.

    Args:
        pool: [num_blocks, block_size, ...], changed in place.
        slots: one for each row.
        rows: [tokens, ...].
    """
    blocks, offsets = np.divmod(np.array(slots, dtype=np.int64), pool.shape[1])
    pool[blocks, offsets] = rows


def gather(pool: np.ndarray, block_ids: list[int], num_tokens: int) -> np.ndarray:
    """Return the rows of a sequence's first `num_tokens` tokens, in order: [num_tokens, ...].

    Args:
        pool: [num_blocks, block_size, ...].
        block_ids: the sequence's blocks, in order; there may be more than the tokens need.
        num_tokens: number of rows.
    """
    blocks = pool[np.array(block_ids, dtype=np.int64)]
    return blocks.reshape(-1, *pool.shape[2:])[:num_tokens]


def hash_block(parent: bytes, tokens: list[int]) -> bytes:
    """Return a hash of a full block: of its tokens, and of the hash of the block before it.

    So it stands for all tokens from the first on. It has at least 16 bytes, and is the same in
    every process (Python's own `hash` is not). `blake2b(data, digest_size=16).digest()` hashes
    bytes, and `array("q", tokens).tobytes()` makes 8 bytes of each id.

    Args:
        parent: hash of the block before it; b"" for the first block.
        tokens: the token ids of the block.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Knows which blocks of a pool are free, how many sequences hold each, and what is in them.

    It handles block ids only. A block is held by one or more sequences, or free. A block with a
    registered hash is cached: it can be found, also while it is free, until it is allocated again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:  # given
        """Start with all blocks free and none cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The keys are the free blocks, the next one to be allocated first. popitem(last=False)
        # takes the first, and move_to_end(block, last=False) moves a block to the front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._counts = [0] * num_blocks  # number of sequences that hold each block
        self._block_of: dict[bytes, int] = {}  # cached block of a hash
        self._hash_of: dict[int, bytes] = {}  # hash of a cached block

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds, cached ones among them."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take the first `count` free blocks, with one holder each, and return their ids.

        Their old contents will be overwritten, so they can no longer be found. Raises ValueError,
        without any change, if fewer are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks are needed, and {self.num_free} are free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._counts[block] = 1
            if block in self._hash_of:
                del self._block_of[self._hash_of.pop(block)]
        return taken

    def free(self, block_ids: list[int]) -> None:
        """Drop one holder of each of a sequence's blocks, which are given in the sequence's order.

        Goes through the blocks from the last to the first. A block that has no holder left becomes
        free: a cached one goes to the end of `_free`, another one to the front. Raises ValueError
        if a block is free already.
        """
        for block in reversed(block_ids):
            if self._counts[block] == 0:
                raise ValueError(f"block {block} is free already")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a held, full block findable by its hash.

        Does nothing if the block is cached already, or another block has that hash.
        """
        if block not in self._hash_of and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def find(self, block_hash: bytes) -> int | None:
        """Return the cached block with that hash, held or free; None if there is none."""
        return self._block_of.get(block_hash)

    def share(self, block: int) -> None:
        """Add a holder to a cached block, which may be free."""
        if self._counts[block] == 0:
            del self._free[block]
        self._counts[block] += 1

    def register_prefix(self, block_ids: list[int], tokens: list[int]) -> None:
        """Register the blocks that a sequence's first tokens fill.

        Args:
            block_ids: blocks of the sequence, in order.
            tokens: its tokens up to the last that is stored.
        """
        size, parent = self.block_size, b""
        for index in range(len(tokens) // size):
            parent = hash_block(parent, tokens[index * size : (index + 1) * size])
            self.register(block_ids[index], parent)

    def find_prefix(self, tokens: list[int]) -> list[int]:
        """Return the cached blocks of the longest known prefix of `tokens`, in order.

        At least one token is left to compute. The blocks are not shared yet.
        """
        size, parent, found = self.block_size, b"", []
        for index in range((len(tokens) - 1) // size):
            parent = hash_block(parent, tokens[index * size : (index + 1) * size])
            block = self.find(parent)
            if block is None:
                break
            found.append(block)
        return found
