"""Shares of bounded room: one client cannot keep the others out.

Whatever a client holds, a newcomer finds room:

    held until it ends   memory, unfinished requests    `Shares.room`: a client may hold at most
                                                        SHARE times what stays free, and `limit`.
                                                        Beyond `limit`, others have a spare quarter.
    only waiting         calls, grammars, workers       `Shares.displaced`: a client may hold all;
                                                        where there is no room, the newest item of
                                                        the client with most makes way for one that
                                                        would still hold less.

The first rule is the dynamic threshold of Choudhury and Hahne, "Dynamic queue length thresholds for
shared-memory packet switches" (1998). The second is theirs for packets that may be pushed out. Both
leave a lone client the whole limit. A client is the digest of an API key, or an address.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
SHARE = 4
"""A client may hold so many times as much as it leaves free."""


class Shares:
    """What each client holds of bounded room. For use by one thread.

    Attributes:
        limit: what one client may hold; None for no limit.
        total: what all clients hold.
    """

    def __init__(self, limit: int | None, held: Iterable[str] = ()) -> None:
        """Start with one for each of the clients in `held`."""
        self.limit = limit
        self._held = Counter(held)
        self.total = self._held.total()

    def held(self, client: str) -> int:
        """Return what a client holds."""
        return self._held[client]

    @property
    def capacity(self) -> int | None:
        """What all clients may hold together: a quarter more than one of them."""
        return None if self.limit is None else self.limit + self.limit // SHARE + 2

    def fit(self, total: int) -> None:
        """Lower the limit so that all clients together hold at most `total`, about."""
        if self.limit is not None:
            self.limit = min(self.limit, total * SHARE // (SHARE + 1))

    def missing(self, client: str, amount: int) -> int:
        """Return by how much `amount` exceeds what the client may take now; 0 if it does not."""
        if self.limit is None or self.capacity is None:
            return 0
        own, free = self._held[client], self.capacity - self.total
        room = min(self.limit - own, (SHARE * free - own) // (SHARE + 1))
        return max(0, amount - max(0, room))

    def described(self, client: str) -> str:
        """Return what a refused client would pass, for an error message."""
        own = self._held[client]
        others = "" if own == self.total else f" of one client, who has {own}, beside others"
        return f"the limit of {self.limit}{others}"

    def take(self, client: str, amount: int) -> None:
        """Add to what a client holds."""
        self._held[client] += amount
        self.total += amount

    def release(self, client: str, amount: int) -> None:
        """Subtract from what a client holds."""
        self.total -= amount
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]

    def displaced(self, client: str) -> str | None:
        """Return the client with most, if it would hold more than `client` with one item each way.

        None where no client makes way.
        """
        largest, count = max(self._held.items(), key=lambda item: item[1], default=("", 0))
        return largest if count > self._held[client] + 1 else None


class FairQueue(Generic[T]):
    """A queue of items for each client, which take turns. For use under one lock."""

    def __init__(self, limit: int | None = None) -> None:
        """Hold at most `limit` items; None for no limit."""
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._shares = Shares(limit)

    def __len__(self) -> int:
        """Return the number of items."""
        return self._shares.total

    def __iter__(self) -> Iterator[T]:
        """Iterate over the items, client by client."""
        return (item for queue in self._queues.values() for item in queue)

    def put(self, client: str, item: T) -> T | None:
        """Append an item of a client; return the item that has no place in turn.

        It is the newest of the client with most, `item` itself where no client has more, or None.
        """
        out: T | None = None
        limit = self._shares.limit
        if limit is not None and self._shares.total >= limit:
            largest = self._shares.displaced(client)
            if largest is None:
                return item
            out = self._queues[largest][-1]
            self.remove(largest, out)
        self._queues.setdefault(client, deque()).append(item)
        self._shares.take(client, 1)
        return out

    def take(self) -> T:
        """Remove and return the next client's first item, and move the client last."""
        client, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[client] = queue
        self._shares.release(client, 1)
        return item

    def remove(self, client: str, item: T) -> bool:
        """Remove an item. Return whether it was in the queue."""
        queue = self._queues.get(client)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        self._shares.release(client, 1)
        if not queue:
            del self._queues[client]
        return True

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = list(self)
        while self._queues:
            self.take()
        return items
