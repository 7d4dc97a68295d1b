"""The autoscaling policy: scale up on unfinished requests, or when a replica's own queue fills.

Ray Serve's policy aims at a number of unfinished requests for each replica. That number says little
about long prompts, so the policy also reads the measure of the replicas' admission control: the
share of the queue's room, in choices and tokens, that is taken (EngineReplica.
record_autoscaling_stats). Above HIGH_SHARE one more replica is wanted.

A decision removes at most half of the replicas, because a new one loads, and has an empty prefix
cache. Ray Serve waits `downscale_delay_s` before each such decision.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

HIGH_SHARE = 0.5


def desired_replicas(
    current: int, ongoing: float, target_ongoing: float, queue_share: float
) -> int:
    """Return the number of replicas that the load asks for.

    Args:
        current: replicas that run now.
        ongoing: unfinished requests, running and waiting, of all replicas and of the queue before
            them.
        target_ongoing: unfinished requests that one replica should have.
        queue_share: the largest share of a replica's queue that is taken, from 0 to 1.
    """
    wanted = max(math.ceil(ongoing / target_ongoing), math.ceil(current / 2))
    if queue_share > HIGH_SHARE:
        wanted = max(wanted, current + 1)
    return wanted


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas for Ray Serve, which applies the limits and the delays."""
    metrics = context.aggregated_metrics or {}
    shares = metrics.get("queue_share", {})
    config = context.config
    wanted = desired_replicas(
        context.current_num_replicas,
        context.total_num_requests,
        config.get_target_ongoing_requests() if config is not None else 1.0,
        max(shares.values(), default=0.0),
    )
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(wanted, high)), context.policy_state
