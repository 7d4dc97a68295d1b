"""The routing policy: cached prefixes attract requests, within a bound on the imbalance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.deploy.prefix_policy import PrefixPolicy

A, B, C = b"a", b"b", b"c"


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy()
    policy.set_replicas(["one", "two"])
    policy.add_routed("two", [A, B])
    assert policy.rank([A, B, C], {"one": 0, "two": 3}) == ["two", "one"]
    assert policy.rank([C], {"one": 1, "two": 0}) == ["two", "one"]
    assert policy.rank([C, A], {"one": 0, "two": 1}) == ["one", "two"]  # a chain from its start


def test_the_longest_prefix_wins() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy()
    policy.add_routed("one", [A])
    policy.add_routed("two", [A, B])
    assert policy.rank([A, B], {"one": 0, "two": 2}) == ["two", "one"]
    assert policy.rank([A, C], {"one": 0, "two": 2}) == ["one", "two"]


def test_a_replica_beyond_the_bound_is_not_preferred() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy(max_extra_requests=4)
    policy.add_routed("one", [A])
    assert policy.rank([A], {"one": 4, "two": 0})[0] == "one"
    assert policy.rank([A], {"one": 5, "two": 0})[0] == "two"


def test_new_prefixes_are_spread_over_idle_replicas() -> None:
    policy: PrefixPolicy[int] = PrefixPolicy()
    policy.set_replicas(range(3))
    chosen = []
    for name in (A, B, C):
        replica = policy.rank([name], {0: 0, 1: 0, 2: 0})[0]
        policy.add_routed(replica, [name])
        chosen.append(replica)
    assert sorted(chosen) == [0, 1, 2]


def test_short_prompts_take_turns() -> None:
    policy: PrefixPolicy[int] = PrefixPolicy()
    policy.set_replicas(range(3))
    chosen = []
    for _ in range(6):
        chosen.append(policy.rank([], {0: 0, 1: 0, 2: 0})[0])
        policy.add_routed(chosen[-1], [])
    assert chosen == [0, 1, 2, 0, 1, 2]
    assert policy.rank([], {0: 1, 1: 0, 2: 0})[0] == 1


def test_as_many_blocks_are_remembered_as_a_replica_has() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy(max_blocks=4)
    policy.set_replicas(["one", "two"], {"two": 1})
    for name in ("one", "two"):
        policy.add_routed(name, [A, B, C])
    assert [policy.cached_blocks(name, [A, B, C]) for name in ("one", "two")] == [3, 1]
    policy.set_replicas(["one", "two"], {"one": 2})
    assert [policy.cached_blocks(name, [A, B, C]) for name in ("one", "two")] == [2, 1]


def test_the_least_recent_blocks_are_forgotten() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy(max_blocks=2)
    policy.add_routed("one", [A, B])
    policy.add_routed("one", [A])
    policy.add_routed("one", [C])
    assert policy.cached_blocks("one", [A, B]) == 1
    assert policy.cached_blocks("one", [C]) == 1


def test_a_replica_that_has_ended_is_forgotten() -> None:
    policy: PrefixPolicy[str] = PrefixPolicy()
    policy.add_routed("one", [A])
    policy.set_replicas(["two"])
    policy.set_replicas(["one", "two"])
    assert policy.cached_blocks("one", [A]) == 0


@pytest.mark.parametrize("limits", [{"max_blocks": 0}, {"max_extra_requests": -1}])
def test_limits_are_checked(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1 and 0"):
        PrefixPolicy(**limits)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.sampled_from([A, B, C]), max_size=3)), max_size=30
    ),
    st.dictionaries(st.integers(0, 3), st.integers(0, 12), min_size=1),
    st.lists(st.sampled_from([A, B, C]), max_size=3),
)
def test_every_replica_is_ranked_once_and_the_first_is_within_the_bound(
    routed: list[tuple[int, list[bytes]]], loads: dict[int, int], hashes: list[bytes]
) -> None:
    policy: PrefixPolicy[int] = PrefixPolicy(max_blocks=4, max_extra_requests=3)
    for replica, chain in routed:
        policy.add_routed(replica, chain)
    ranked = policy.rank(hashes, loads)
    assert sorted(ranked) == sorted(loads)
    assert loads[ranked[0]] <= min(loads.values()) + 3
