"""PrefixAwareRouter: PrefixPolicy as a request router of Ray Serve.

Ray Serve creates one router in each process that calls the deployment. The ingress passes the block
hashes of a prompt as the argument `prefix_hashes` of the call. Replicas report the number of their
blocks by EngineReplica.record_routing_stats.
"""

from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from nanovllm.deploy.prefix_policy import (
    MAX_BLOCKS,
    MAX_EXTRA_REQUESTS,
    NUM_BLOCKS,
    PrefixPolicy,
)

PREFIX_ARGUMENT = "prefix_hashes"


class PrefixAwareRouter(FIFOMixin, RequestRouter):
    """Prefers the replica that has the prompt's prefix cached; see PrefixPolicy."""

    def initialize_state(
        self, max_blocks: int = MAX_BLOCKS, max_extra_requests: float = MAX_EXTRA_REQUESTS
    ) -> None:
        """Create the policy from the `request_router_kwargs` of the deployment."""
        self._policy: PrefixPolicy[ReplicaID] = PrefixPolicy(
            max_blocks=max_blocks, max_extra_requests=max_extra_requests
        )

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run now."""
        super().update_replicas(replicas)
        self._policy.set_replicas(
            [replica.replica_id for replica in replicas],
            {
                replica.replica_id: replica.routing_stats[NUM_BLOCKS]
                for replica in replicas
                if NUM_BLOCKS in replica.routing_stats
            },
        )

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, the best first; full ones come last."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        loads = {replica_id: float(self._load(replica_id)) for replica_id in by_id}
        ranked = [by_id[name] for name in self._policy.rank(_hashes(pending_request), loads)]
        available = {replica.replica_id for replica in self.select_available_replicas(ranked)}
        ranked.sort(key=lambda replica: replica.replica_id not in available)  # a stable sort
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember where the prompt went."""
        self._policy.add_routed(replica_id, _hashes(pending_request))

    def _load(self, replica_id: ReplicaID) -> int:
        return self.replica_queue_len_cache.get(replica_id) or 0


def _hashes(pending_request: PendingRequest | None) -> tuple[bytes, ...]:
    if pending_request is None:
        return ()
    hashes: tuple[bytes, ...] = pending_request.kwargs.get(PREFIX_ARGUMENT, ())
    return hashes
