"""Blocks of the KV cache: ids, reference counts and the prefix cache. No tensors.

A full block is found by the hash of its tokens and of its parent's hash, so prompts with a common
prefix find the same blocks. A block that no request holds stays cached until its memory is needed:
blocks without cached contents are allocated first, then the least recently used ones. The idea is
that of vLLM's automatic prefix caching.

Each cached block has the name of the request that computed it, so that the blocks of a request
whose numbers were not finite can be invalidated.
"""

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

# A collision would give one request another's keys and values. 128 bits rule out deliberate ones.
_HASH_BYTES = 16


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of a full block: a digest of its parent's hash and its tokens."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_HASH_BYTES).digest()


def hash_salt(salt: str) -> bytes:
    """Return the parent hash of a first block: a digest, so no salt equals a block's hash."""
    return blake2b(salt.encode(), digest_size=_HASH_BYTES, person=b"cache-salt").digest()


@dataclass(slots=True)
class _CachedBlock:
    """A block in the prefix cache.

    Attributes:
        block_hash, parent: its hash, and that of the block before it.
        writer: name of the request that computes it.
        is_proven: a request has read the block and got finite numbers.
    """

    block_hash: bytes
    parent: bytes
    writer: str
    is_proven: bool = False


class BlockManager:
    """Allocates `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        """Start with all blocks free and none cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # In the order of allocation.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._cached: dict[int, _CachedBlock] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, with those that are cached."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, from 0 to 1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, with one reference each, out of the prefix cache."""
        assert count <= len(self._free), "the caller checks num_free first"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._references[block] = 1
        return taken

    def is_writable(self, block: int) -> bool:
        """Return whether one request alone holds the block, and the cache does not have it."""
        return self._references[block] == 1 and block not in self._cached

    def share(self, block: int) -> None:
        """Add a reference to a block of the prefix cache, or to one that a sibling holds."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each of a request's blocks.

        The last block will be reused before the first, which more prompts may share.
        """
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, f"block {block} is free already"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._cached:
                    self._free.move_to_end(block, last=False)

    def register(
        self, block: int, block_hash: bytes, parent: bytes = b"", writer: str = ""
    ) -> None:
        """Add a full block to the prefix cache, unless one with that hash is in it.

        Args:
            parent: hash of the block before it.
            writer: name of the request that computes the block.
        """
        if (
            self.enable_prefix_caching
            and block_hash not in self._block_of
            and block not in self._cached
        ):
            self._block_of[block_hash] = block
            self._cached[block] = _CachedBlock(block_hash, parent, writer)

    def unregister(self, block: int, block_hash: bytes) -> None:
        """Undo `register`, if the cached block of that hash is this one."""
        cached = self._cached.get(block)
        if cached is not None and cached.block_hash == block_hash:
            self._forget(block)

    def mark_proven(self, block: int) -> None:
        """Note that a request has read a block and got finite numbers."""
        cached = self._cached.get(block)
        if cached is not None:
            cached.is_proven = True

    def invalidate(self, writer: str, held: Iterable[int]) -> set[int]:
        """Drop the cached blocks that `writer` computed, and those of `held` that are not proven.

        Blocks that continue them are dropped too, because they were computed from them. Returns all
        of these blocks; requests may hold some of them.
        """
        roots = {block for block, cached in self._cached.items() if cached.writer == writer}
        roots |= {
            block for block in held if block in self._cached and not self._cached[block].is_proven
        }
        children: dict[bytes, list[int]] = defaultdict(list)
        for block, cached in self._cached.items():
            children[cached.parent].append(block)
        dropped: set[int] = set()
        pending = list(roots)
        while pending:
            block = pending.pop()
            if block not in dropped:
                dropped.add(block)
                pending += children.get(self._cached[block].block_hash, ())
        for block in dropped:
            self._forget(block)
            if block in self._free:
                self._free.move_to_end(block, last=False)
        return dropped

    def find(self, block_hash: bytes) -> int | None:
        """Return the cached block with that hash, in use or free; None where there is none."""
        return self._block_of.get(block_hash)

    def reset_prefix_cache(self) -> None:
        """Drop every cached block."""
        self._block_of.clear()
        self._cached.clear()

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that counts and lists agree; `held` are the block tables of all requests."""
        counts = [0] * self.num_blocks
        for block_ids in held:
            assert len(set(block_ids)) == len(block_ids), (
                f"a request holds a block twice: {block_ids}"
            )
            for block in block_ids:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from what requests hold"
        assert set(self._free) == {block for block, count in enumerate(counts) if count == 0}, (
            "the free list differs from the unused blocks"
        )
        assert {
            cached.block_hash: block for block, cached in self._cached.items()
        } == self._block_of, "a block is not found by its own hash"

    def _forget(self, block: int) -> None:
        cached = self._cached.pop(block, None)
        if cached is not None:
            del self._block_of[cached.block_hash]
