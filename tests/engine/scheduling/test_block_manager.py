"""BlockManager: reference counts stay consistent, and a hash finds the block registered for it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanovllm.engine.scheduling.block_manager import BlockManager, hash_block
from tests.support.scheduling import uncached_free_blocks


def test_hash_depends_on_tokens_and_on_everything_before_them() -> None:
    first = hash_block(b"", [1, 2, 3, 4])
    assert first == hash_block(b"", (1, 2, 3, 4))
    assert (
        len(
            {
                first,
                hash_block(b"", [1, 2, 3, 5]),
                hash_block(first, [1, 2, 3, 4]),
                hash_block(b"salt", [1, 2, 3, 4]),
            }
        )
        == 4
    )


def test_blocks_are_handed_out_in_order_and_come_back() -> None:
    manager = BlockManager(4, 8)
    taken = manager.allocate(3)
    assert taken == [0, 1, 2]
    assert (manager.num_free, manager.num_used, manager.usage) == (1, 3, 0.75)
    manager.free(taken)
    assert manager.num_free == 4
    assert manager.allocate(4)[:3] == [0, 1, 2], (
        "freed blocks that hold nothing findable are reused first, in order"
    )


def test_freeing_twice_is_a_defect() -> None:
    manager = BlockManager(2, 8)
    taken = manager.allocate(1)
    manager.free(taken)
    with pytest.raises(AssertionError, match="free already"):
        manager.free(taken)


def test_a_cached_block_is_found_until_its_memory_is_needed() -> None:
    manager = BlockManager(2, 8)
    (block,) = manager.allocate(1)
    manager.register(block, b"name")
    manager.free([block])
    assert manager.find(b"name") == block
    manager.share(block)
    assert manager.num_used == 1
    manager.free([block])
    manager.allocate(2)
    assert manager.find(b"name") is None


def test_least_recently_used_goes_first_and_the_tail_of_a_prompt_before_its_head() -> None:
    manager = BlockManager(5, 8)
    old, new = manager.allocate(2), manager.allocate(2)
    for block, name in zip(old + new, (b"old0", b"old1", b"new0", b"new1"), strict=True):
        manager.register(block, name)
    manager.free(old)
    manager.free(new)
    manager.share(old[0])  # a hit makes it the most recently used
    manager.free([old[0]])
    gone = []
    for _ in range(5):
        manager.allocate(1)
        gone += [
            name
            for name in (b"old0", b"old1", b"new0", b"new1")
            if manager.find(name) is None and name not in gone
        ]
    assert gone == [b"old1", b"new1", b"new0", b"old0"]


def test_equal_blocks_are_registered_once() -> None:
    manager = BlockManager(2, 8)
    first, second = manager.allocate(2)
    manager.register(first, b"same")
    manager.register(second, b"same")
    assert manager.find(b"same") == first
    manager.check_integrity([[first], [second]])


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(1, 8, enable_prefix_caching=False)
    (block,) = manager.allocate(1)
    manager.register(block, b"name")
    assert manager.find(b"name") is None


def test_a_continuation_follows_the_latest_children_that_begin_as_the_text_does() -> None:
    manager = BlockManager(5, 3)
    a, b, c, d = manager.allocate(4)
    manager.register(a, b"a", b"", "", [1, 2, 3])
    manager.register(b, b"b", b"a", "", [4, 5, 6])
    manager.register(c, b"c", b"a", "", [4, 7, 8])
    manager.register(d, b"d", b"b", "", [9, 9, 9])
    assert manager.continuation(b"", [], 4) == (1, 2, 3, 4)
    assert manager.continuation(b"", [1, 2], 5) == (3, 4, 7, 8)
    assert manager.continuation(b"a", [4, 5], 9) == (6, 9, 9, 9)
    assert manager.continuation(b"a", [5], 9) == manager.continuation(b"e", [], 9) == ()
    assert manager.continuation(b"", [], 4, "another client") == ()
    manager.free([a, b, c, d])
    manager.allocate(3)  # the free one, and the last blocks of the text: d and c
    assert manager.continuation(b"a", [4], 9) == (5, 6)


class BlockManagerMachine(RuleBasedStateMachine):
    """Any order of operations against a plain model: a list of holders and a map of names."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(6, 4)
        self.holders: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.counter = 0

    @precondition(lambda self: self.manager.num_free > 0)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        blocks = self.manager.allocate(data.draw(st.integers(1, self.manager.num_free)))
        for block in blocks:
            assert not any(block in holder for holder in self.holders), (
                "a block that somebody holds was handed out"
            )
            self.names.pop(block, None)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.manager.free(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        name = b"%d" % self.counter
        self.counter += 1
        parent = data.draw(st.sampled_from([b"", *self.names.values()]))
        self.manager.register(block, name, parent)
        self.names.setdefault(block, name)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.names)))
        assert self.manager.find(self.names[block]) == block
        self.manager.share(block)
        self.holders.append([block])

    @rule()
    def clear(self) -> None:
        self.manager.reset_prefix_cache()
        self.names.clear()

    @invariant()
    def books_balance(self) -> None:
        self.manager.check_integrity(self.holders)
        assert self.manager.num_free + self.manager.num_used == 6
        for block, name in self.names.items():
            assert self.manager.find(name) == block
        assert (
            set(uncached_free_blocks(self.manager))
            == set(range(6)) - {b for holder in self.holders for b in holder} - self.names.keys()
        )


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
