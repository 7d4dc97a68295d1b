"""PrefixPolicy: send a request where its prefix is cached, unless that replica is too busy.

The policy remembers, for each replica, the block hashes of the prompts that it was sent: the same
hash chain as that of the engine's prefix cache (block_manager.py), in least-recently-used order and
bounded by the replica's number of blocks. It never asks a replica, so its memory is an estimate: a
replica may have evicted a block that the policy still remembers, which costs time but no error.

Routing by estimated prefix hits with a bound on imbalance is the policy of SGLang's router and of
Preble (Srivatsa et al. 2024, arXiv:2407.00023).
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)

NUM_BLOCKS = "num_blocks"
"""Name under which a replica reports the number of blocks of its KV cache."""
MAX_EXTRA_REQUESTS = 4
"""Default bound: a cached prefix may attract this many requests more than the least busy replica
has."""
MAX_BLOCKS = 32768
"""Default number of block hashes that are remembered for a replica of unknown size."""


class PrefixPolicy(Generic[R]):
    """Ranks replicas for each request, and learns from where the requests went. For one thread."""

    def __init__(
        self, *, max_blocks: int = MAX_BLOCKS, max_extra_requests: float = MAX_EXTRA_REQUESTS
    ) -> None:
        """Start without replicas.

        Args:
            max_blocks: number of block hashes to remember for a replica of unknown size.
            max_extra_requests: a replica with more requests than this above the least busy one
                is never preferred for its cache.

        Raises:
            ValueError: a limit is not positive.
        """
        if max_blocks < 1 or max_extra_requests < 0:
            raise ValueError(
                f"max_blocks is {max_blocks} and max_extra_requests is {max_extra_requests}, but "
                "they must be at least 1 and 0"
            )
        self._max_blocks = max_blocks
        self._max_extra_requests = max_extra_requests
        self._blocks: dict[R, OrderedDict[bytes, None]] = {}
        self._num_blocks: Mapping[R, int] = {}
        self._turns: dict[R, int] = {}  # when each was last chosen, counted in requests
        self._num_routed = 0

    def set_replicas(
        self, replicas: Iterable[R], num_blocks: Mapping[R, int] | None = None
    ) -> None:
        """Forget the replicas that are gone, and start empty for the new ones.

        Args:
            replicas: the replicas that run now.
            num_blocks: blocks of a replica's KV cache, where known: as many hashes are remembered.
        """
        present = set(replicas)
        self._num_blocks = num_blocks or {}
        for replica in [known for known in self._blocks if known not in present]:
            del self._blocks[replica]
            self._turns.pop(replica, None)
        for replica in present:
            self._forget_oldest(replica, self._blocks.setdefault(replica, OrderedDict()))

    def cached_blocks(self, replica: R, hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks of a prompt the replica has probably cached."""
        blocks = self._blocks.get(replica) or OrderedDict()
        for count, block_hash in enumerate(hashes):
            if block_hash not in blocks:
                return count
        return len(hashes)

    def rank(self, hashes: Sequence[bytes], loads: Mapping[R, float]) -> list[R]:
        """Return the replicas, best first.

        Args:
            hashes: block hashes of the prompt's full blocks; empty if the prefix is unknown.
            loads: unfinished requests of each replica.
        """
        if not loads:
            return []
        limit = min(loads.values()) + self._max_extra_requests
        cached = {
            replica: self.cached_blocks(replica, hashes) if load <= limit else 0
            for replica, load in loads.items()
        }
        # Among equals, the replica that has seen the fewest prompts: new prefixes spread evenly.
        # Prompts shorter than a block take turns.
        return sorted(
            loads,
            key=lambda name: (
                -cached[name],
                loads[name],
                len(self._blocks.get(name, ())),
                self._turns.get(name, 0),
            ),
        )

    def add_routed(self, replica: R, hashes: Sequence[bytes]) -> None:
        """Remember that a prompt with these blocks was sent to the replica."""
        self._num_routed += 1
        self._turns[replica] = self._num_routed
        blocks = self._blocks.setdefault(replica, OrderedDict())
        # The first blocks become the most recent: a chain is of use only from its start.
        for block_hash in reversed(hashes):
            blocks[block_hash] = None
            blocks.move_to_end(block_hash)
        self._forget_oldest(replica, blocks)

    def _forget_oldest(self, replica: R, blocks: OrderedDict[bytes, None]) -> None:
        """Forget the least recent blocks that the replica's cache has no room for."""
        limit = self._num_blocks.get(replica, self._max_blocks)
        while len(blocks) > limit:
            blocks.popitem(last=False)
