"""ClientQueues: the waiting requests of each client, and the order in which clients are served.

Under the policy "fair" each client has a counter of the service that it has received (virtual token
counters, Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588). The
client with the smallest counter comes first, and its requests in the order (priority, arrival). All
requests belong to one client under the other policies, so that only (priority, arrival) counts.

Service is counted when a step is planned: a prompt chunk by chunk, without tokens that are found in
the cache, and a token of the output when it is sampled. What is computed again after a preemption
counts for the client for which the place was taken, or for nobody.

A client that begins to wait is lifted to the smallest counter of the waiting clients, or to that of
the client that waited last if nobody waits, so that no client accumulates credit while it is idle.
A client whose waiting requests all lack a mask counts as idle.

Bound. Let clients f and g have waiting requests with their masks at every moment from s to t.
Their counters differ by at most D = (max_num_seqs + 1) * C at every moment of it if they did at s,
where C is the largest cost of one request. Let f be ahead at t. When a request of f was last first
in the order, at time u, no waiting client had a smaller counter, nor has any client got one since:
counters only grow, and whoever began to wait was lifted to a waiting client's. After u, no request
of f was admitted. So f was only charged for its requests that ran at u, at most max_num_seqs times
C, and for the place that its first request took at u, at most C.
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence

from nanovllm.engine.scheduling.request import Request, RequestState
from nanovllm.engine.scheduling.step_plan import PlannedSequence

PROMPT_COST, OUTPUT_COST, LOGPROB_COST = 1, 4, 1
"""Costs of a prompt token, a token of the output, and the log-probabilities of a prompt token.

The bundled model takes 56 us of one core for a prompt token in prompts of 500, 37 us more with 20
log-probabilities, and 158 us (255 us) for a token decoded in a batch of 32 (8).
"""
MAX_IDLE_CLIENTS = 1024
"""Clients without requests whose counters are kept while others have requests."""


class _Client:
    """A client with unfinished requests.

    Attributes:
        counter: the service that it has received.
        could_run: whether one of its waiting requests had its mask when it was last looked at.
        num_unfinished: number of its unfinished requests.
        waiting: those of them that wait, in their order.
    """

    __slots__ = ("could_run", "counter", "num_unfinished", "waiting")

    def __init__(self, counter: int) -> None:
        self.counter = counter
        self.could_run = False
        self.num_unfinished = 0
        self.waiting: list[Request] = []


class ClientQueues:
    """The waiting requests of all clients, and the counters of their clients."""

    def __init__(self, *, is_fair: bool) -> None:
        """Start without clients; unless `is_fair`, all requests belong to one client."""
        self.is_fair = is_fair
        self._clients: dict[str, _Client] = {}
        self._idle: OrderedDict[str, int] = OrderedDict()  # counters, latest last
        self._level = 0  # no counter of a client that could run is smaller
        self._last = ""  # the client whose request left the queue last

    def __len__(self) -> int:
        """Return the number of clients with unfinished requests."""
        return len(self._clients)

    def client(self, request: Request) -> str:
        """Return the client to which a request belongs."""
        return request.client if self.is_fair else ""

    def counter(self, request: Request) -> int:
        """Return the service that an unfinished request's client has received."""
        return self._clients[self.client(request)].counter

    def key(self, request: Request) -> tuple[int, int, int]:
        """Return the sort key of an unfinished request in the order; the smallest comes first."""
        return (self.counter(request), *request.sort_key)

    def in_order(self, blocked: Container[str] = ()) -> "WaitingOrder":
        """Begin a step: return the order of the waiting requests, without those in `blocked`.

        This lifts the counters of clients whose mask has arrived.
        """
        ready = []
        for client in self._clients.values():
            can_run = any(request.request_id not in blocked for request in client.waiting)
            if can_run and not client.could_run:
                ready.append(client)
            client.could_run = can_run and client.could_run
        for client in ready:
            self._lift(client)
        waiting = [list(client.waiting) for client in self._clients.values() if client.waiting]
        merged = waiting[0] if len(waiting) == 1 else heapq.merge(*waiting, key=self.key)
        return WaitingOrder(request for request in merged if request.request_id not in blocked)

    def add(self, request: Request) -> None:
        """Add a new request, which waits."""
        name = self.client(request)
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(self._idle.pop(name, 0))
        client.num_unfinished += 1
        self.push(request)

    def push(self, request: Request) -> None:
        """Add a request that waits, for the first time or again."""
        client = self._clients[self.client(request)]
        if not client.waiting:
            self._lift(client)
        insort(client.waiting, request, key=_sort_key)

    def _lift(self, client: _Client) -> None:
        """Lift the counter of a client that begins to wait."""
        counters = [other.counter for other in self._clients.values() if other.could_run]
        last = self._clients.get(self._last)
        self._level = max(self._level, min(counters, default=0 if last is None else last.counter))
        client.counter = max(client.counter, self._level)
        client.could_run = True

    def remove(self, request: Request) -> None:
        """Remove a request that waits no more."""
        name = self.client(request)
        client = self._clients[name]
        del client.waiting[bisect_left(client.waiting, request.sort_key, key=_sort_key)]
        client.could_run = client.could_run and bool(client.waiting)
        self._last = name

    def finish(self, request: Request) -> None:
        """Forget an unfinished request that does not wait, and clients that come to an end.

        The counter of a client without requests is kept while others have requests, so that nobody
        gains by coming back. Of more than MAX_IDLE_CLIENTS, the one that left first is forgotten.
        """
        name = self.client(request)
        client = self._clients[name]
        client.num_unfinished -= 1
        if client.num_unfinished:
            return
        del self._clients[name]
        if client.counter > self._level:
            self._idle[name] = client.counter
        if len(self._idle) > MAX_IDLE_CLIENTS:
            self._idle.popitem(last=False)
        if not self._clients:
            self._idle.clear()
            self._level = 0

    def charge(self, request: Request, cost: int) -> None:
        """Count service for the client of a request."""
        self._clients[self.client(request)].counter += cost

    def lead(self, request: Request, other: Request) -> int:
        """Return how much more the client of `request` has received than that of `other`."""
        return self.counter(request) - self.counter(other)

    def find_victim(
        self,
        running: Sequence[Request],
        head: Request,
        lead: int,
        *,
        needs_slot: bool,
        num_blocks: int,
    ) -> Request | None:
        """Return the running request whose place `head` may take; None if there is none.

        It is the last in the order whose client has received more than that of `head`, by `lead`
        and the cost of recomputing it; and has at least two more running requests, if `head` needs
        a slot, and more blocks than that of `head` would have, if it needs blocks. The client of
        `head` pays for the recomputation. So no more is recomputed than clients had received ahead
        of others, and no place goes to and fro.

        Args:
            running: the running requests in their order.
            head: the first of the waiting requests.
            lead: the smallest lead that counts.
            needs_slot: whether all slots are taken.
            num_blocks: blocks that `head` needs; 0 if enough are free.
        """
        slots = Counter(self.client(request) for request in running)
        blocks: Counter[str] = Counter()
        for request in running:
            blocks[self.client(request)] += len(request.block_ids)
        own = self.client(head)
        for request in reversed(running):
            name = self.client(request)
            if (
                self.lead(request, head) >= lead + recompute_cost(request)
                and (not needs_slot or slots[name] >= slots[own] + 2)
                and (not num_blocks or blocks[name] > blocks[own] + num_blocks)
            ):
                return request
        return None

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that exactly the waiting ones of all unfinished `requests` are queued."""
        counts: dict[str, int] = {}
        waiting = {id(request) for client in self._clients.values() for request in client.waiting}
        for request in requests:
            name = self.client(request)
            counts[name] = counts.get(name, 0) + 1
            assert (id(request) in waiting) == (request.state is RequestState.WAITING)
        assert counts == {name: client.num_unfinished for name, client in self._clients.items()}
        assert len(waiting) == sum(len(client.waiting) for client in self._clients.values())
        for client in self._clients.values():
            assert client.waiting == sorted(client.waiting, key=_sort_key)
            assert client.waiting or not client.could_run
            assert not client.could_run or client.counter >= self._level
        assert len(self._idle) <= MAX_IDLE_CLIENTS


class WaitingOrder:
    """The waiting requests of a step, first to last; those that are preempted in it are not here.

    Attributes:
        head: the first request that was not taken yet; None at the end.
    """

    __slots__ = ("_rest", "head")

    def __init__(self, requests: Iterator[Request]) -> None:
        """Take requests from an iterator."""
        self._rest = requests
        self.head = next(requests, None)

    def take(self) -> None:
        """Go on to the next request."""
        self.head = next(self._rest, None)


def cost_of(sequence: PlannedSequence) -> int:
    """Return the cost of what a step computes for a request for the first time."""
    request = sequence.request
    first = max(sequence.start, request.num_paid_tokens)
    num_prompt = max(0, min(sequence.start + sequence.count, request.num_prompt_tokens) - first)
    return (
        PROMPT_COST * num_prompt
        + OUTPUT_COST * sequence.samples
        + LOGPROB_COST * len(sequence.prompt_logprob_positions)
    )


def recompute_cost(request: Request) -> int:
    """Return the cost of recomputing a running request after a preemption."""
    return PROMPT_COST * request.num_computed_tokens


def _sort_key(request: Request) -> tuple[int, int]:
    return request.sort_key
