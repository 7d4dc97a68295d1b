"""KVCacheManager: the block table of each request, prefix sharing, forks and copy-on-write.

A request's block table (`Request.block_ids`) has one block for every `block_size` tokens. Requests
share blocks in two ways. Requests with a common prefix find each other's full blocks in the prefix
cache. Choices of one prompt fork from the choice that has computed the prompt: a fork holds the
same blocks, including the last, partly filled one. Before a request writes to a shared block, it
gets a copy (copy-on-write), so no choice ever writes to a block of another.

The class and its methods are named as in vLLM. This module handles only ids and counts: it plans
copies, and the engine makes them.
"""

from collections.abc import Collection, Iterable, Sequence

from nanovllm.engine.scheduling.block_manager import BlockManager, hash_block, hash_salt
from nanovllm.engine.scheduling.request import Request


class KVCacheManager:
    """Allocates and frees the blocks of requests.

    Attributes:
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found, for metrics.
    """

    def __init__(self, blocks: BlockManager) -> None:
        """Manage the block tables of requests over `blocks`."""
        self.blocks = blocks
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._block_size = blocks.block_size
        # Of the step being planned: copies by request id, and the first position that the step
        # computes in each block that it fills.
        self._copies: dict[str, tuple[int, int]] = {}
        self._filled_from: dict[int, int] = {}

    @property
    def copies(self) -> tuple[tuple[int, int], ...]:
        """Copies that the step being planned needs, each as (from, to)."""
        return tuple(self._copies.values())

    def begin_step(self) -> None:
        """Forget the previous step: its copies have been made, its blocks are filled."""
        self._copies = {}
        self._filled_from = {}

    def blocks_needed(self, request: Request) -> int:
        """Return how many more blocks a request needs for all known tokens, including a copy."""
        num_blocks = self.blocks.blocks_for(len(request.tokens))
        return max(0, num_blocks - len(request.block_ids)) + self._needs_copy(request)

    def free_blocks_needed(self, request: Request, readers: Collection[Request]) -> int:
        """Return how many free blocks a request without blocks would take for all known tokens.

        These are all of its blocks except those that it would share with running requests.
        `readers` are the siblings that have computed the prompt.
        """
        if request.can_fork and readers:
            return (
                1
                + self.blocks.blocks_for(len(request.tokens))
                - self.blocks.blocks_for(request.num_prompt_tokens)
            )
        num_held = 0
        if not request.needs_whole_prompt and self.blocks.enable_prefix_caching:
            for index in range((len(request.tokens) - 1) // self._block_size):
                block = self.blocks.find(self._block_hash(request, index))
                if block is None:
                    break
                num_held += self.blocks.references[block] > 0
        return self.blocks.blocks_for(len(request.tokens)) - num_held

    def max_tokens(self, request: Request) -> int:
        """Return the number of tokens that fit a request's blocks and all free blocks."""
        return (self.blocks.num_free + len(request.block_ids)) * self._block_size

    def allocate_slots(self, request: Request, count: int) -> bool:
        """Give a request writable blocks for its next `count` tokens.

        Returns False without any change if too few blocks are free. Call it at most once per step
        and request, because requests planned later may share the blocks that this one fills.
        """
        needs_copy = self._needs_copy(request)
        num_blocks = self.blocks.blocks_for(request.num_computed_tokens + count)
        if num_blocks - len(request.block_ids) + needs_copy > self.blocks.num_free:
            return False
        if needs_copy:
            self._copy_on_write(request)
        self.extend_slots(request, count)
        return True

    def extend_slots(self, request: Request, count: int) -> None:
        """Append the blocks missing for the next `count` tokens; the caller checks num_free."""
        num_blocks = self.blocks.blocks_for(request.num_computed_tokens + count)
        if num_blocks > len(request.block_ids):
            request.block_ids += self.blocks.allocate(num_blocks - len(request.block_ids))

    def free(self, request: Request) -> None:
        """Free all blocks of a request and reset its computed tokens to 0."""
        self.blocks.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.num_registered_blocks = 0
        request.num_finite_blocks = 0
        self._copies.pop(request.request_id, None)

    def take_computed(self, request: Request, readers: Iterable[Request]) -> None:
        """Share computed blocks that hold a request's next tokens.

        They come from `readers`, the siblings (other choices of the prompt) that have computed the
        whole prompt, or from the prefix cache. At least one token is left to compute.
        """
        if request.can_fork and request.num_prompt_tokens > 1:
            for other in readers:
                has_blocks = other.request_id not in self._copies  # a planned copy may be undone
                if has_blocks and self._can_copy_last_block(other):
                    self.fork(request, other, request.num_prompt_tokens - 1)
                    return
        self._take_cached_blocks(request)

    def fork(self, request: Request, source: Request, num_computed_tokens: int) -> None:
        """Share the prompt's blocks of `source`, and set the number of computed tokens."""
        num_blocks = self.blocks.blocks_for(request.num_prompt_tokens)
        request.block_ids = source.block_ids[:num_blocks]
        for block in request.block_ids:
            self.blocks.share(block)
        request.num_computed_tokens = num_computed_tokens
        request.block_hashes = source.block_hashes[: request.num_prompt_tokens // self._block_size]
        request.num_registered_blocks = min(
            source.num_registered_blocks, num_computed_tokens // self._block_size
        )
        request.num_cached_tokens = request.num_cached_tokens or 0
        request.num_shared_tokens = num_computed_tokens

    def count_prefix_hits(self, request: Request) -> None:
        """Count the cached tokens of a request's prompt, at its first admission only."""
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.prefix_cache_queries += request.num_prompt_tokens
            self.prefix_cache_hits += request.num_cached_tokens

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Cache the blocks of a request that are full once `num_tokens` tokens are computed.

        Requests planned later in the same step may share them, because every layer stores all keys
        and values of a batch before any query reads them.
        """
        num_full = num_tokens // self._block_size
        if num_full <= request.num_registered_blocks or not self.blocks.enable_prefix_caching:
            return
        for index in range(request.num_registered_blocks, num_full):
            block_hash = self._block_hash(request, index)
            parent = self._parent_hash(request, index)
            tokens = request.tokens[index * self._block_size : (index + 1) * self._block_size]
            self.blocks.register(
                request.block_ids[index], block_hash, parent, request.writer, tokens, request.client
            )
            self._filled_from[request.block_ids[index]] = request.num_computed_tokens
        request.num_registered_blocks = num_full

    def continuation(self, request: Request, count: int) -> tuple[int, ...]:
        """Return at most `count` tokens that follow a request's known tokens in the prefix cache.

        They are text of the client's other requests with the same beginning and salt.
        """
        if not self.blocks.enable_prefix_caching:
            return ()  # without hashing the blocks
        index = len(request.tokens) // self._block_size
        known = request.tokens[index * self._block_size :]
        parent = self._parent_hash(request, index)
        return self.blocks.continuation(parent, known, count, request.client)

    def uncache_blocks(self, request: Request, start: int) -> set[int]:
        """Undo `cache_blocks` from position `start` on; return the removed blocks."""
        indices = range(start // self._block_size, request.num_registered_blocks)
        for index in indices:
            self.blocks.unregister(request.block_ids[index], request.block_hashes[index])
        return {request.block_ids[index] for index in indices}

    def mark_finite(self, request: Request) -> None:
        """Record that attention over all computed tokens of a request has given finite outputs."""
        num_full = request.num_computed_tokens // self._block_size
        for index in range(request.num_finite_blocks, num_full):
            self.blocks.mark_finite(request.block_ids[index])
        request.num_finite_blocks = max(request.num_finite_blocks, num_full)

    def invalidate(self, request: Request) -> set[int]:
        """Uncache the blocks that may hold keys or values that are not finite; return them."""
        return self.blocks.invalidate(request.writer, request.block_ids)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that reference counts and block tables of all unfinished `requests` agree."""
        tables: list[Sequence[int]] = []
        for request in requests:
            assert len(request.block_ids) >= self.blocks.blocks_for(request.num_computed_tokens)
            tables.append(request.block_ids)
        self.blocks.check_integrity(tables)

    def _needs_copy(self, request: Request) -> bool:
        """Return whether the block of a request's next token exists but is not writable.

        It is registered already if the step being planned fills it: then it needs no copy.
        """
        index = request.num_computed_tokens // self._block_size
        if index >= len(request.block_ids) or index < request.num_registered_blocks:
            return False
        return not self.blocks.is_writable(request.block_ids[index])

    def _can_copy_last_block(self, source: Request) -> bool:
        """Return whether the last block of a prompt can be copied before this step.

        It cannot if the source has found it in the prefix cache: this step may still fill it, and a
        copy would not be found when the request that wrote the block fails.
        """
        position = source.num_prompt_tokens - 1  # a fork computes it again
        block = source.block_ids[position // self._block_size]
        is_own = self.blocks.writer(block) in (None, source.writer)
        return is_own and self._filled_from.get(block, position) >= position

    def _copy_on_write(self, request: Request) -> None:
        """Replace the shared block of a request's next token by a new block, and plan the copy."""
        index = request.num_computed_tokens // self._block_size
        shared = request.block_ids[index]
        (copy,) = self.blocks.allocate(1)
        request.block_ids[index] = copy
        self.blocks.free([shared])
        self._copies[request.request_id] = (shared, copy)

    def _take_cached_blocks(self, request: Request) -> None:
        """Share blocks of the prefix cache that hold a request's next tokens.

        This happens at every chunk, not only at the first, because another request with the same
        prompt may be a chunk ahead. A full cached block replaces a partly filled one.
        """
        if request.needs_whole_prompt or not self.blocks.enable_prefix_caching:
            return
        index = request.num_computed_tokens // self._block_size
        while (index + 1) * self._block_size < len(request.tokens):
            block = self.blocks.find(self._block_hash(request, index))
            if block is None:
                return
            self.blocks.share(block)
            self.blocks.free(request.block_ids[index:])
            request.block_ids[index:] = [block]
            index += 1
            request.num_computed_tokens = index * self._block_size
            request.num_registered_blocks = index

    def _parent_hash(self, request: Request, index: int) -> bytes:
        """Return the hash of the block before a request's block `index`."""
        return self._block_hash(request, index - 1) if index else hash_salt(request.cache_salt)

    def _block_hash(self, request: Request, index: int) -> bytes:
        """Return the hash of a request's block `index`; hashes are computed once and kept."""
        size, hashes = self._block_size, request.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else hash_salt(request.cache_salt)
            hashes.append(hash_block(parent, request.tokens[start : start + size]))
        return hashes[index]
