"""The autoscaling policy of Ray Serve."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install -e '.[ray]'")

from nanovllm.deploy.scaling import desired_replicas, scale


@pytest.mark.parametrize(
    ("current", "ongoing", "share", "wanted"),
    [
        (2, 32, 0.0, 2),  # all slots busy and no queue: none is removed
        (2, 33, 0.0, 3),
        (2, 8, 0.6, 3),  # a queue that fills with long prompts
        (16, 0, 0.0, 8),
        (8, 0, 0.0, 4),
        (1, 0, 0.0, 1),
        (3, 16, 0.0, 2),
    ],
)
def test_the_number_of_replicas_follows_the_load(
    current: int, ongoing: float, share: float, wanted: int
) -> None:
    assert desired_replicas(current, ongoing, 16, share) == wanted


@pytest.mark.parametrize(("ongoing", "wanted"), [(0, 4), (1000, 12), (90, 6)])
def test_the_limits_of_the_application_hold(ongoing: float, wanted: int) -> None:
    context: Any = SimpleNamespace(
        aggregated_metrics=None, config=SimpleNamespace(get_target_ongoing_requests=lambda: 16.0),
        current_num_replicas=6, total_num_requests=ongoing, policy_state={},
        capacity_adjusted_min_replicas=4, capacity_adjusted_max_replicas=12,
    )  # fmt: skip
    assert scale(context) == (wanted, {})
