"""BlockManager: ids, reference counts and prefix cache of the KV cache's blocks. No tensors.

The key of a full block is the hash of its tokens and of its parent's key, so prompts with a common
prefix find the same blocks. A block that no request holds stays cached until its memory is needed:
blocks without cached contents are allocated first, then the least recently used ones. The design
follows vLLM's automatic prefix caching.

Each cached block has the name of the request that computed it (its writer). If the hidden states or
logits of a request are not finite, the blocks that it wrote are invalidated.
"""

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, KeysView, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

# A collision would give a request the keys and values of another. With 128 bits, an attacker cannot
# construct one.
_HASH_BYTES = 16
_MAX_CANDIDATES = 8


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
        block_hash, parent: hash of this block, and of the block before it.
        tokens, client: what it holds, and who has sent it.
        writer: name of the request that computes the block (`Request.writer`).
        is_finite: attention over the block has given finite outputs.
    """

    block_hash: bytes
    parent: bytes
    writer: str
    tokens: Sequence[int]
    client: str
    is_finite: bool = False


class BlockManager:
    """Allocates `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        """Start with all blocks free and none cached."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Keys are free blocks, in the order in which they are allocated.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._cached: dict[int, _CachedBlock] = {}
        self._block_of: dict[bytes, int] = {}
        # By the parent's hash, in the order in which they were registered.
        self._children: defaultdict[bytes, dict[int, None]] = defaultdict(dict)
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        """Number of blocks that can be allocated, including cached blocks that no request holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of blocks that requests hold."""
        return self.num_blocks - len(self._free)

    @property
    def usage(self) -> float:
        """Fraction of the blocks that requests hold, from 0 to 1."""
        return self.num_used / self.num_blocks

    @property
    def num_cached(self) -> int:
        """Number of free blocks that the prefix cache can still find."""
        return self._num_cached

    @property
    def references(self) -> Sequence[int]:
        """Number of requests that hold each block; not to be changed."""
        return self._references

    @property
    def cached_blocks(self) -> KeysView[int]:
        """Blocks in the prefix cache, held or free."""
        return self._cached.keys()

    def writer(self, block: int) -> str | None:
        """Return the name of the request that wrote a cached block; None if it is not cached."""
        cached = self._cached.get(block)
        return None if cached is None else cached.writer

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, with one reference each; evict them from the prefix cache."""
        assert count <= len(self._free), "the caller checks num_free first"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._uncache(block)
            self._references[block] = 1
        return taken

    def is_writable(self, block: int) -> bool:
        """Return whether exactly one request holds the block and it is not in the prefix cache."""
        return self._references[block] == 1 and block not in self._cached

    def share(self, block: int) -> None:
        """Add a reference to a block of the prefix cache, or to one that a sibling holds."""
        if self._references[block] == 0:
            del self._free[block]
            self._num_cached -= 1
        self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each of a request's blocks, given in order.

        The last blocks are reused first, because more prompts share the first ones.
        """
        for block in reversed(list(blocks)):
            assert self._references[block] > 0, f"block {block} is free already"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block in self._cached:
                    self._num_cached += 1
                else:
                    self._free.move_to_end(block, last=False)

    def register(
        self,
        block: int,
        block_hash: bytes,
        parent: bytes = b"",
        writer: str = "",
        tokens: Sequence[int] = (),
        client: str = "",
    ) -> None:
        """Add a full block to the prefix cache, unless it has a block with that hash.

        Args:
            parent: hash of the block before it.
            writer: name of the request that computes the block.
            tokens, client: what the block holds and who has sent it, for `continuation`.
        """
        if (
            self.enable_prefix_caching
            and block_hash not in self._block_of
            and block not in self._cached
        ):
            self._block_of[block_hash] = block
            self._cached[block] = _CachedBlock(block_hash, parent, writer, tokens, client)
            self._children[parent][block] = None

    def unregister(self, block: int, block_hash: bytes) -> None:
        """Remove the block from the prefix cache, if it is cached under that hash."""
        cached = self._cached.get(block)
        if cached is not None and cached.block_hash == block_hash:
            self._uncache(block)

    def mark_finite(self, block: int) -> None:
        """Record that attention over a block has given finite outputs."""
        cached = self._cached.get(block)
        if cached is not None:
            cached.is_finite = True

    def invalidate(self, writer: str, held: Iterable[int]) -> set[int]:
        """Uncache the blocks that `writer` computed, and the blocks of `held` that are not finite.

        Their descendants were computed from them and are removed too. Returns all removed blocks;
        requests may still hold some of them.
        """
        roots = {block for block, cached in self._cached.items() if cached.writer == writer}
        roots |= {
            block for block in held if block in self._cached and not self._cached[block].is_finite
        }
        dropped: set[int] = set()
        pending = list(roots)
        while pending:
            block = pending.pop()
            if block not in dropped:
                dropped.add(block)
                pending += self._children.get(self._cached[block].block_hash, ())
        for block in dropped:
            self._uncache(block)
            if block in self._free:
                self._free.move_to_end(block, last=False)
        return dropped

    def find(self, block_hash: bytes) -> int | None:
        """Return the cached block with that hash, held or free; None if there is none."""
        return self._block_of.get(block_hash)

    def continuation(
        self, parent: bytes, known: Sequence[int], count: int, client: str = ""
    ) -> tuple[int, ...]:
        """Return at most `count` tokens that follow `known` after the block with hash `parent`.

        They are text of the same client: what a draft gains would tell others token by token
        whether they have guessed the text. Of several cached blocks the latest counts, of the last
        few that were registered.
        """
        tokens: list[int] = []
        while len(tokens) < count:
            for block in islice(reversed(self._children.get(parent, {})), _MAX_CANDIDATES):
                cached = self._cached[block]
                if cached.client == client and list(cached.tokens[: len(known)]) == list(known):
                    break
            else:
                break
            tokens += cached.tokens[len(known) :]
            parent, known = cached.block_hash, ()
        return tuple(tokens[:count])

    def reset_prefix_cache(self) -> None:
        """Remove every block from the prefix cache."""
        self._block_of.clear()
        self._cached.clear()
        self._children.clear()
        self._num_cached = 0

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the state is consistent; `held` are the block tables of all requests."""
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
        assert {block: parent for parent, each in self._children.items() for block in each} == {
            block: cached.parent for block, cached in self._cached.items()
        }, "a block is not found by its parent's hash"
        assert self._num_cached == sum(block in self._free for block in self._cached), (
            "the number of cached free blocks is wrong"
        )

    def _uncache(self, block: int) -> None:
        """Remove a block from the prefix cache, if it is there."""
        cached = self._cached.pop(block, None)
        if cached is not None:
            del self._block_of[cached.block_hash]
            del self._children[cached.parent][block]
            if not self._children[cached.parent]:
                del self._children[cached.parent]
            self._num_cached -= self._references[block] == 0
