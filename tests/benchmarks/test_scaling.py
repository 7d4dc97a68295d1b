"""The simulation of replicas: its trace, its cost model, and what it must reproduce."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling.cost_model import CostModel, FrontCost, StepSize, fit, relative_errors
from benchmarks.scaling.simulate import capacity
from benchmarks.scaling.simulator import POLICIES, Policy, Result, Router, simulate
from benchmarks.scaling.trace import TraceSettings, draw
from nanovllm.config import EngineConfig

COST = CostModel(step=5e-4, prompt=6e-5, decode=1e-4, context=2e-8)
CONFIG = EngineConfig()
TRACE = TraceSettings(rate=80, requests=120, prefixes=16)


def run(policy: Policy, replicas: int, trace: TraceSettings = TRACE) -> Result:
    return simulate(draw(trace), replicas, policy, COST, config=CONFIG, num_blocks=96)


def test_a_trace_is_reproducible_and_has_its_rate() -> None:
    trace = replace(TRACE, requests=4000)
    first, second = list(draw(trace)), list(draw(trace))
    assert first == second
    assert first[-1].time_s == pytest.approx(4000 / 80, rel=0.1)
    bursts = list(draw(replace(trace, arrivals="bursts")))
    assert bursts[-1].time_s == pytest.approx(4000 / 80, rel=0.2)
    phases = np.array([arrival.time_s for arrival in bursts]) % (trace.burst_s * 4)
    assert phases.max() <= trace.burst_s + 1e-6


def test_the_cost_model_is_recovered_from_steps() -> None:
    generator = np.random.default_rng(0)
    sizes = [StepSize(*generator.integers(1, 500, 3).tolist()) for _ in range(50)]
    seconds = [COST.seconds(size) for size in sizes]
    fitted = fit(sizes, seconds)
    assert np.abs(relative_errors(fitted, sizes, seconds)).max() < 1e-6
    assert fitted.decode == pytest.approx(COST.decode)


def test_coefficients_are_not_negative() -> None:
    sizes = [StepSize(count, 1, 10 * count) for count in range(1, 20)]
    seconds = [1e-3 + 1e-5 * count for count in range(1, 20)]
    fitted = fit(sizes, seconds)
    assert min(fitted.step, fitted.prompt, fitted.decode, fitted.context) >= 0
    assert np.abs(relative_errors(fitted, sizes, seconds)).max() < 0.05


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 steps and 3 times cannot be fitted"):
        fit([StepSize(1, 1, 1)] * 3, [1.0] * 3)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_in_full(policy: Policy) -> None:
    result = run(policy, 3)
    assert len(result.ttft_s) == 120
    assert min(result.ttft_s) > 0
    assert result.output_tokens == sum(arrival.output_tokens for arrival in draw(TRACE))
    assert sum(result.requests_per_replica) == 120


def test_a_single_idle_replica_takes_the_time_of_its_steps() -> None:
    trace = TraceSettings(rate=0.1, requests=3, prefixes=3, prefix_tokens=64)
    result = run("round-robin", 1, trace)
    for arrival, ttft_s in zip(draw(trace), result.ttft_s, strict=True):
        tokens = len(arrival.prompt)
        whole = COST.seconds(StepSize(tokens, 0, tokens * (tokens + 1) // 2))
        assert ttft_s <= whole * 1.01


def test_the_ingress_limits_the_throughput() -> None:
    trace = replace(TRACE, rate=400, requests=600)
    front = FrontCost(0.001, 0.0001, 0.01, 0.001)

    def throughput(ingresses: int) -> Result:
        return simulate(
            draw(trace), 16, "round-robin", COST, config=CONFIG, num_blocks=96, front=front,
            num_ingresses=ingresses,
        )  # fmt: skip

    single, many = throughput(1), throughput(16)
    limit = front.ingress_capacity(single.output_tokens / 600)
    assert 600 / single.duration_s == pytest.approx(limit, rel=0.1)
    assert single.ingress_busy > 0.9 > many.ingress_busy
    assert 600 / many.duration_s > 4 * limit
    assert single.output_tokens == many.output_tokens


def test_the_first_token_waits_for_proxy_and_ingress() -> None:
    trace = TraceSettings(rate=0.1, requests=3, prefixes=3, prefix_tokens=64)
    front = FrontCost(0.01, 0.02, 0.03, 0.04)
    alone = simulate(draw(trace), 1, "prefix", COST, config=CONFIG, num_blocks=96)
    behind = simulate(draw(trace), 1, "prefix", COST, config=CONFIG, num_blocks=96, front=front)
    for without, seconds in zip(alone.ttft_s, behind.ttft_s, strict=True):
        assert seconds == pytest.approx(without + 0.1)


def test_least_loaded_takes_the_better_of_two() -> None:
    router = Router("least-loaded", 8, 96, 32)
    chosen = [router.choose(()) for _ in range(800)]
    counts = [chosen.count(index) for index in range(8)]
    assert 1 < max(counts) - min(counts) < 20  # not perfect, and not as uneven as one choice
    router.end(chosen[-1])


def test_prefix_routing_hits_more_and_bounds_the_imbalance() -> None:
    trace = replace(TRACE, rate=200, requests=600, prefixes=64)
    spread, affine = run("round-robin", 8, trace), run("prefix", 8, trace)
    assert affine.hit_rate > spread.hit_rate + 0.1
    assert affine.summary()["max_over_mean_requests"] < 2


def test_capacity_is_that_of_a_saturated_replica() -> None:
    trace = replace(TRACE, rate=5000, requests=300, prefixes=300)
    result = run("round-robin", 1, trace)
    assert 300 / result.duration_s == pytest.approx(capacity(COST, trace, CONFIG), rel=0.35)
