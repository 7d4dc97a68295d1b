"""Who owns which block of the KV cache: ids, reference counts and the prefix cache. No tensors.

A full block is known by the hash of its tokens and of everything before them (its parent's hash), so that two prompts that begin
alike find the same blocks. A block nobody uses any more stays findable until its memory is needed: free blocks are handed out least
recently used first, those that nothing can be found in before all others. The idea is that of vLLM's automatic prefix caching.

Each cached block knows who computed it, so that the blocks of a request whose numbers were not finite can be forgotten.
"""

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

_HASH_BYTES = 16  # a collision would hand one request another's keys and values: 128 bits make one unthinkable, even on purpose


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block: a digest of its parent's name and its tokens."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=_HASH_BYTES).digest()


def hash_salt(salt: str) -> bytes:
    """What stands for the parent of a first block: a digest, so that no salt can pass for a block's own name."""
    return blake2b(salt.encode(), digest_size=_HASH_BYTES, person=b"cache-salt").digest()


@dataclass(slots=True)
class _CachedBlock:
    """What is known of a block that can be found.

    Attributes:
        block_hash, parent: its name, and that of the block before it.
        writer: who computes it.
        is_proven: a request has read it and got finite numbers.
    """

    block_hash: bytes
    parent: bytes
    writer: str
    is_proven: bool = False


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        """All blocks free, nothing cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(
            range(num_blocks)
        )  # next to be handed out first
        self._references = [0] * num_blocks
        self._cached: dict[int, _CachedBlock] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones among them."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, from 0 to 1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference; what was cached in them is forgotten."""
        assert count <= len(self._free), "the scheduler asks num_free first"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._references[block] = 1
        return taken

    def is_writable(self, block: int) -> bool:
        """Whether one request alone holds a block, and nothing is found in it: others would read what is written to it."""
        return self._references[block] == 1 and block not in self._cached

    def share(self, block: int) -> None:
        """Add a reference to a block that was found in the prefix cache, or that a request of the same group holds."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give back one reference of each of a request's blocks; the last of them is reused before the first, which more prompts share."""
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
        """Make a full block findable; where an equal one is known already, that one stays.

        Args:
            parent: hash of the block before it.
            writer: name of whoever computes the block.
        """
        if (
            self.enable_prefix_caching
            and block_hash not in self._block_of
            and block not in self._cached
        ):
            self._block_of[block_hash] = block
            self._cached[block] = _CachedBlock(block_hash, parent, writer)

    def unregister(self, block: int, block_hash: bytes) -> None:
        """Undo `register`, where it is this block that is found by the name."""
        cached = self._cached.get(block)
        if cached is not None and cached.block_hash == block_hash:
            self._forget(block)

    def mark_proven(self, block: int) -> None:
        """Note that a request has read a block and got finite numbers."""
        cached = self._cached.get(block)
        if cached is not None:
            cached.is_proven = True

    def distrust(self, writer: str, held: Iterable[int]) -> set[int]:
        """Forget the cached blocks that `writer` computed, and those of `held` that nobody has proven.

        Blocks that continue them are forgotten too, because they were computed from them. Returns
        all of these blocks; requests may hold some of them.
        """
        roots = {block for block, cached in self._cached.items() if cached.writer == writer}
        roots |= {
            block for block in held if block in self._cached and not self._cached[block].is_proven
        }
        children: dict[bytes, list[int]] = defaultdict(list)
        for block, cached in self._cached.items():
            children[cached.parent].append(block)
        distrusted: set[int] = set()
        pending = list(roots)
        while pending:
            block = pending.pop()
            if block not in distrusted:
                distrusted.add(block)
                pending += children.get(self._cached[block].block_hash, ())
        for block in distrusted:
            self._forget(block)
            if block in self._free:
                self._free.move_to_end(block, last=False)
        return distrusted

    def find(self, block_hash: bytes) -> int | None:
        """The block of that name, used or free."""
        return self._block_of.get(block_hash)

    def reset_prefix_cache(self) -> None:
        """Forget every cached block, for when what they hold can no longer be trusted."""
        self._block_of.clear()
        self._cached.clear()

    def uncached_free_blocks(self) -> list[int]:
        """Free blocks in which nothing can be found: their contents must never be read."""
        return [block for block in self._free if block not in self._cached]

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the books balance; `held` are the block ids of every request that has any."""
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
