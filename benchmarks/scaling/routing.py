"""Measure the routing policies on two replicas under Ray Serve, beside the simulator's prediction.

Run: python -m benchmarks.scaling.routing --model models/gpt2-random --json routing.json
     (needs the extra ray)

One trace of prompts with shared prefixes is sent at its arrival times to two replicas of one
thread, once for each policy. The simulator runs the same trace with a cost model that is fitted to
the engine's steps in this process, with the times of the proxy and the ingress that front_cost.py
has measured, and with what else a single request takes beside its step. It gives each process a
core of its own: measure with as many cores as replicas, proxy, ingress and client together.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import finish, new_parser, tell
from benchmarks.scaling.cost_model import CostModel, FrontCost, StepSize
from benchmarks.scaling.deployments import Deployment, deploy, ray_cluster
from benchmarks.scaling.simulate import FRONT, capacity, measure
from benchmarks.scaling.simulator import POLICIES, Policy, Result, simulate
from benchmarks.scaling.trace import Arrival, TraceSettings, draw
from nanovllm.cli.argument_types import positive, positive_number, print_message
from nanovllm.cli.bench.http_client import Server
from nanovllm.cli.bench.serve import Load, send
from nanovllm.config import BUNDLED_MODEL, EngineConfig
from nanovllm.hub import resolve_model

REPLICAS = 2
_SINGLE_REQUESTS = 9
_SINGLE_TOKENS = 64
_TIMEOUT_S = 600.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL, help="folder or name (%(default)s)")
    parser.add_argument("--quantization", choices=("int8",), help="of the weights")
    parser.add_argument("--requests", type=positive, default=160, help="(%(default)s)")
    parser.add_argument("--load", type=positive_number, default=0.8, help="(%(default)s)")
    parser.add_argument("--arrivals", default="poisson", choices=("poisson", "bursts"))
    parser.add_argument(
        "--kv-cache-memory", default="128MiB", help="of a replica: what it caches (%(default)s)"
    )
    parser.add_argument("--cost", type=Path, metavar="FILE", help="coefficients of an earlier run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, simulate and report."""
    parsed = parse(arguments)
    front = FrontCost.load(FRONT)
    config = EngineConfig(num_threads=1, quantization=parsed.quantization)
    shape = TraceSettings(rate=1, requests=1)
    if parsed.cost is not None:
        cost = CostModel.load(parsed.cost)
    else:
        tell("fitting the cost model")
        try:
            cost, _ = measure(resolve_model(parsed.model), config, shape)
        except ValueError as error:
            print_message(str(error), "benchmarks.scaling.routing")
            return 2
    settings = replace(
        shape,
        rate=parsed.load * REPLICAS * capacity(cost, shape, config),
        requests=parsed.requests, arrivals=parsed.arrivals, prefixes=16 * REPLICAS,
        seed=parsed.seed,
    )  # fmt: skip
    trace = list(draw(settings))
    record: dict[str, Any] = {
        "benchmark": "routing", "model": Path(parsed.model).name, "rate": settings.rate,
        "quantization": parsed.quantization, "requests": parsed.requests,
        "arrivals": parsed.arrivals, "policies": {},
    }  # fmt: skip
    with ray_cluster(REPLICAS) as port:
        for policy in POLICIES:
            tell(f"{policy}: starting")
            deployment = deploy(port, {"models": [model_settings(parsed, policy)]})
            warm_up(deployment)
            num_blocks = blocks_of(deployment)
            predicted_cost = replace(cost, request=request_s(deployment, cost, front))
            measured = replay(deployment, trace)
            predicted = simulate(
                trace, REPLICAS, policy, predicted_cost, config=config, num_blocks=num_blocks,
                front=front,
            )  # fmt: skip
            record["policies"][policy] = {
                "measured": measured.summary(),
                "predicted": predicted.summary(),
                "request_s": predicted_cost.request,
                "num_blocks": num_blocks,
            }
    finish(record, parsed)
    return 0


def model_settings(parsed: argparse.Namespace, policy: Policy) -> dict[str, Any]:
    """Return the settings of the model for Ray Serve."""
    options = {"kv-cache-memory": parsed.kv_cache_memory}
    if parsed.quantization is not None:
        options["quantization"] = parsed.quantization
    return {
        "model": parsed.model, "replicas": REPLICAS, "num_threads": 1, "routing": policy,
        "max_ongoing_requests": 256, "max_queued_requests": 1024, "options": options,
    }  # fmt: skip


def warm_up(deployment: Deployment) -> None:
    """Send requests until both replicas have answered one."""
    for number in range(100):
        if sum(count > 0 for count in answered(deployment).values()) == REPLICAS:
            return
        deployment.ask("/v1/completions", {"prompt": [number] * 4, "max_tokens": 1})
    raise RuntimeError(f"100 requests reached {answered(deployment)} of {REPLICAS} replicas")


def answered(deployment: Deployment) -> dict[str, float]:
    """Return the number of answered requests of each replica, by its name."""
    return deployment.metric("request_success_total")


def blocks_of(deployment: Deployment) -> int:
    """Return the number of blocks of a replica's KV cache."""
    page = deployment.ask("/metrics")[1].decode()
    return int(page.partition('num_gpu_blocks="')[2].partition('"')[0])


def request_s(deployment: Deployment, cost: CostModel, front: FrontCost) -> float:
    """Return what a single request takes to its first token, beside its step and `front`."""
    generator = np.random.default_rng(1)
    arrivals = [
        Arrival(0.0, tuple(generator.integers(0, 250, _SINGLE_TOKENS).tolist()), 1)
        for _ in range(_SINGLE_REQUESTS)
    ]
    times = [replay(deployment, [arrival]).ttft_s[0] for arrival in arrivals]
    size = StepSize(_SINGLE_TOKENS, 0, _SINGLE_TOKENS * (_SINGLE_TOKENS + 1) // 2)
    known_s: float = cost.seconds(size) + sum(asdict(front).values())
    return max(0.0, float(statistics.median(times)) - known_s)


def replay(deployment: Deployment, arrivals: Sequence[Arrival]) -> Result:
    """Send requests at their times; raises RuntimeError if one of them fails."""
    bodies: list[dict[str, Any]] = [
        {
            "prompt": list(arrival.prompt),
            "max_tokens": arrival.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for arrival in arrivals
    ]
    before = answered(deployment)
    load = Load(bodies, [arrival.time_s for arrival in arrivals], None, _TIMEOUT_S)
    traces = asyncio.run(send(Server.at(deployment.url), load))
    errors = [trace.error for trace in traces if trace.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(traces)} requests failed: {errors[0]}")
    after = answered(deployment)
    first_s = traces[0].start_s
    prompt_tokens = sum(trace.input_tokens for trace in traces)
    return Result(
        [trace.ttft_s for trace in traces],
        max(trace.chunk_times_s[-1] for trace in traces) - first_s,
        sum(trace.output_tokens for trace in traces),
        sum(trace.cached_tokens for trace in traces) / prompt_tokens,
        [int(count - before.get(replica, 0.0)) for replica, count in after.items()],
    )


if __name__ == "__main__":
    sys.exit(main())
