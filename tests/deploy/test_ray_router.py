"""The request router of Ray Serve, without Ray Serve's own part of it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e '.[ray]'")

from ray.serve.request_router import RequestRouter

from nanovllm.deploy.prefix_policy import NUM_BLOCKS
from nanovllm.deploy.ray_router import PrefixAwareRouter

CHAIN = tuple(bytes([number]) for number in range(8))


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    def none(self: RequestRouter, *_: object) -> None:
        return None

    monkeypatch.setattr(RequestRouter, "__init__", none)
    monkeypatch.setattr(RequestRouter, "update_replicas", none)
    monkeypatch.setattr(RequestRouter, "replica_queue_len_cache", {}, raising=False)
    monkeypatch.setattr(PrefixAwareRouter, "select_available_replicas", lambda _, ranked: ranked)
    created: Any = PrefixAwareRouter()
    created.initialize_state()
    return created


def test_the_index_has_the_size_of_the_replicas_cache(router: Any) -> None:
    small = SimpleNamespace(replica_id="small", routing_stats={NUM_BLOCKS: 2})
    new = SimpleNamespace(replica_id="new", routing_stats={})  # has not reported yet
    router.update_replicas([small, new])
    request = SimpleNamespace(kwargs={"prefix_hashes": CHAIN})
    for replica in (small, new):
        router.on_request_routed(request, replica.replica_id, None)
    (best, *_) = asyncio.run(router.choose_replicas([small, new], request))
    assert best == [new]  # with an index of 8 blocks for both, the small one had its turn
