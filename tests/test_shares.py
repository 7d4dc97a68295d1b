"""Shares of bounded room: limits hold, newcomers find room, and released room comes back."""

from collections import Counter, deque

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm.shares import SHARE, FairQueue, Shares

CLIENTS = st.sampled_from("abcde")
LIMIT = 40


class SharesMachine(RuleBasedStateMachine):
    """Any order of taking and releasing, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares(LIMIT)
        self.held: list[tuple[str, int]] = []

    @property
    def capacity(self) -> int:
        assert self.shares.capacity is not None
        return self.shares.capacity

    def own(self, client: str) -> int:
        return sum(amount for one, amount in self.held if one == client)

    @rule(client=CLIENTS, amount=st.integers(1, LIMIT + 5))
    def take(self, client: str, amount: int) -> None:
        own, free = self.own(client), self.capacity - self.shares.total
        missing = self.shares.missing(client, amount)
        may_take = own + amount <= min(LIMIT, SHARE * (free - amount))
        assert (missing == 0) is may_take
        if missing < amount:  # what is missing is exact
            assert not self.shares.missing(client, amount - missing)
        if not missing:
            self.shares.take(client, amount)
            self.held.append((client, amount))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client, amount = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.shares.release(client, amount)

    @invariant()
    def limits_hold_and_a_lone_client_has_all(self) -> None:
        assert self.shares.total == sum(amount for _, amount in self.held) <= self.capacity
        clients = {client for client, _ in self.held}
        for client in clients:
            own = self.own(client)
            assert own == self.shares.held(client) <= LIMIT
        if len(clients) <= 1:
            for client in clients or {"a"}:
                assert not self.shares.missing(client, LIMIT - self.own(client))

    @invariant()
    def a_newcomer_finds_room(self) -> None:
        """Each client leaves a fifth of what it found, however much it asked for."""
        num_clients = len({client for client, _ in self.held})
        free = self.capacity - self.shares.total
        assert free * (SHARE + 1) ** num_clients >= self.capacity
        if num_clients <= 1:
            assert not self.shares.missing("newcomer", min(LIMIT, SHARE * free // 5))


TestShares = SharesMachine.TestCase


class QueueMachine(RuleBasedStateMachine):
    """Any order of putting, taking and removing, against a deque for each client."""

    limit = 6

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(self.limit)
        self.waiting: dict[str, deque[int]] = {}
        self.count = 0

    @rule(client=CLIENTS)
    def put(self, client: str) -> None:
        self.count += 1
        held = Counter({one: len(items) for one, items in self.waiting.items()})
        largest = max(held.values(), default=0)
        out = self.queue.put(client, self.count)
        if held.total() < self.limit:
            assert out is None
        elif out == self.count:
            assert held[client] + 1 >= largest
            share = self.limit // len({client, *held})
            assert held[client] + 1 > share, "a client under its share was refused"
            return
        else:
            loser = next(one for one, items in self.waiting.items() if out in items)
            assert held[loser] == largest > held[client] + 1
            assert self.waiting[loser].pop() == out, "the newest makes way"
        self.waiting.setdefault(client, deque()).append(self.count)

    @precondition(lambda self: any(self.waiting.values()))
    @rule()
    def take(self) -> None:
        item = self.queue.take()
        client = next(one for one, items in self.waiting.items() if items and items[0] == item)
        self.waiting[client].popleft()

    @precondition(lambda self: any(self.waiting.values()))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([one for one, items in self.waiting.items() if items]))
        item = data.draw(st.sampled_from(list(self.waiting[client])))
        assert self.queue.remove(client, item)
        assert not self.queue.remove(client, item)
        self.waiting[client].remove(item)

    @invariant()
    def it_holds_the_same(self) -> None:
        items = [item for queue in self.waiting.values() for item in queue]
        assert len(self.queue) == len(items) <= self.limit
        assert sorted(self.queue) == sorted(items)


TestQueue = QueueMachine.TestCase


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        assert queue.put(item[0], item) is None
    assert [queue.take() for _ in range(4)] == ["a1", "b1", "c1", "a2"]
    assert sorted(queue.clear()) == ["a3", "c2"]
    assert not queue


def test_without_a_limit_nothing_is_missing() -> None:
    shares = Shares(None)
    shares.take("a", 10**12)
    assert not shares.missing("a", 10**12)
    assert shares.capacity is None
