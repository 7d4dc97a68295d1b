"""Simulate 1 to 64 replicas under Poisson and bursty arrivals, for each routing policy.

Run: python -m benchmarks.scaling.simulate --json scaling.json     (after make install)
     python benchmarks/table.py scaling.json --write docs/maintainers/measurements.md
     python -m tools.scaling_chart scaling.json

Measures engine steps of the model first, and fits the cost model to them; --cost takes the
coefficients of an earlier run instead, and a bad fit ends the program. The times of Ray Serve's
proxy and of the ingress are those that front_cost.py has measured. Each number of replicas gets the
same load per replica, a share of the capacity that one replica has without its prefix cache.

Each replica is a machine with a proxy. There is one ingress for every --replicas-per-ingress
replicas; prefix-aware routing is also simulated with a single one.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.options import finish, new_parser
from benchmarks.scaling.cost_model import (
    CostModel,
    FrontCost,
    StepSize,
    check_fit,
    fit,
    relative_errors,
)
from benchmarks.scaling.simulator import POLICIES, Result, simulate, step_size
from benchmarks.scaling.trace import Arrivals, TraceSettings, draw
from nanovllm.cli.argument_types import positive, positive_number, print_message
from nanovllm.config import BUNDLED_MODEL, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.scheduling.step_plan import NO_MASKS_MISSING, MaskStates, StepPlan
from nanovllm.hub import resolve_model
from nanovllm.sampling_params import SamplingParams

REPLICAS = (1, 2, 4, 16, 64)
_REQUESTS_PER_REPLICA = 150
_MAX_REQUESTS = 4_000
"""Of one simulation: 64 replicas get fewer requests each, so that it ends within minutes."""
_MEASURED_REQUESTS = 120
_ARRIVALS: tuple[Arrivals, ...] = ("poisson", "bursts")
FRONT = Path(__file__).with_name("front.json")
"""Costs of the proxy and the ingress, written by front_cost.py."""
CACHE_BLOCKS = 113
"""Blocks of 32 tokens of gpt2-random in 128 MiB of float32 KV cache: routing.py's replicas."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, simulate, print the figures and write them."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", default=BUNDLED_MODEL, help="folder or name (%(default)s)")
    parser.add_argument("--quantization", choices=("int8",), help="of the weights")
    parser.add_argument("--cost", type=Path, metavar="FILE", help="coefficients of an earlier run")
    parser.add_argument("--save-cost", type=Path, metavar="FILE", help="write the coefficients")
    parser.add_argument(
        "--load", type=positive_number, default=0.8,
        help="share of the capacity of a replica without prefix cache (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-blocks", type=positive, default=CACHE_BLOCKS, metavar="BLOCKS",
        help="of each replica's KV cache (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--front", type=Path, default=FRONT, metavar="FILE",
        help="costs of the proxy and the ingress, of front_cost.py (those beside this program)",
    )  # fmt: skip
    parser.add_argument(
        "--replicas-per-ingress", type=positive, default=8, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--arrivals", nargs="+", default=_ARRIVALS, choices=_ARRIVALS, help="(both)"
    )
    parser.add_argument("--replicas", type=positive, nargs="+", default=REPLICAS, metavar="N")
    parser.set_defaults(threads=1)
    parsed = parser.parse_args(arguments)
    config = EngineConfig(num_threads=parsed.threads, quantization=parsed.quantization)
    trace = TraceSettings(rate=1, requests=1, seed=parsed.seed)
    record: dict[str, Any] = {
        "benchmark": "simulate", "model": Path(parsed.model).name, "load": parsed.load,
        "quantization": parsed.quantization, "cache_blocks": parsed.cache_blocks,
    }  # fmt: skip
    front = FrontCost.load(parsed.front)
    if parsed.cost is not None:
        cost = CostModel.load(parsed.cost)
    else:
        try:
            cost, errors = measure(resolve_model(parsed.model), config, trace)
        except ValueError as error:
            print_message(str(error), parser.prog)
            return 2
        median = float(np.median(np.abs(errors)))
        record["fit"] = {"median_error": median, "steps": len(errors)}
        print(f"cost model of {len(errors)} steps, median error {median:.1%}: {cost}")
    if parsed.save_cost is not None:
        cost.save(parsed.save_cost)
    rate = parsed.load * capacity(cost, trace, config)
    streams = front.ingress_capacity(trace.output_tokens)
    print(
        f"{rate:.2f} requests/s for each replica; an ingress can pass {streams:.0f} streams/s, "
        f"those of {streams / rate:.0f} replicas"
    )
    record |= {
        "cost": asdict(cost), "front": asdict(front), "rate_per_replica": rate,
        "ingress_streams_per_s": streams, "replicas_per_ingress": parsed.replicas_per_ingress,
    }  # fmt: skip
    system = System(cost, front, config, parsed.cache_blocks)
    ratio = parsed.replicas_per_ingress
    record["runs"] = list(_runs(parsed.arrivals, parsed.replicas, ratio, rate, trace, system))
    finish(record, parsed)
    return 0


@dataclass(frozen=True, slots=True)
class System:
    """What is simulated, apart from the number of replicas and their routing."""

    cost: CostModel
    front: FrontCost
    config: EngineConfig
    num_blocks: int


def measure(
    folder: Path, config: EngineConfig, trace: TraceSettings
) -> tuple[CostModel, np.ndarray[Any, np.dtype[np.float64]]]:
    """Run requests of the trace through an engine; return the fit and its relative errors.

    The time of a step is its CPU time with one thread, so that other programs count little.
    Raises ValueError for a bad fit.
    """
    engine = Engine.load(folder, config)
    engine.warm_up()
    plans: list[StepPlan] = []
    schedule = engine.scheduler.schedule

    def recorded(masks: MaskStates = NO_MASKS_MISSING) -> StepPlan:
        plans.append(schedule(masks))
        return plans[-1]

    engine.scheduler.schedule = recorded  # type: ignore[method-assign]
    sizes: list[StepSize] = []
    seconds: list[float] = []
    waiting = list(draw(trace.at_rate(1, _MEASURED_REQUESTS)))
    generator = np.random.default_rng(0)
    vocab = engine.model.vocab
    try:
        while waiting or engine.has_work:
            for arrival in waiting[: int(generator.integers(0, 4))]:
                params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
                prompt = [token % vocab for token in arrival.prompt]
                request = GenerationRequest(prompts=[prompt], params=params)
                (processed,) = engine.input_processor.process(request)
                del waiting[0]
                for sequence in processed.requests:
                    engine.add_request(sequence)
            if not engine.has_work:
                continue
            plans.clear()
            # The size must be taken before the step: it changes the requests of its plan.
            size: list[StepSize] = []
            began_s = time.process_time()
            output = engine.step(lambda: size.append(step_size(plans[-1])))  # noqa: B023
            if size:
                sizes += size
                cpu_s = time.process_time() - began_s
                seconds.append(cpu_s if config.num_threads == 1 else output.stats.duration_s)
    finally:
        engine.close()
    cost = fit(sizes, seconds)
    errors = relative_errors(cost, sizes, seconds)
    check_fit(errors)
    return cost, errors


def capacity(cost: CostModel, trace: TraceSettings, config: EngineConfig) -> float:
    """Return the requests per second that one replica completes without a prefix cache.

    Its steps are taken to be full of decoding sequences, and prompts to come in whole budgets.
    """
    context = trace.prefix_tokens + trace.own_tokens + trace.output_tokens // 2
    decode_step = cost.seconds(StepSize(0, config.max_num_seqs, config.max_num_seqs * context))
    prompt = trace.prefix_tokens + trace.own_tokens
    prefill_s = cost.prompt * prompt + cost.context * prompt * prompt / 2
    return 1 / (prefill_s + trace.output_tokens * decode_step / config.max_num_seqs)


def _runs(
    processes: Sequence[Arrivals],
    replicas: Sequence[int],
    replicas_per_ingress: int,
    rate: float,
    trace: TraceSettings,
    system: System,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each arrival process, number of replicas and policy."""
    cases = [
        (arrivals, count, ingresses, policy)
        for arrivals in processes
        for count in replicas
        for ingresses in sorted({1, math.ceil(count / replicas_per_ingress)}, reverse=True)
        for policy in POLICIES
        if ingresses > 1 or count <= replicas_per_ingress or policy == "prefix"
    ]
    for arrivals, count, ingresses, policy in tqdm(
        cases, unit="run", disable=not sys.stderr.isatty()
    ):
        requests = min(_REQUESTS_PER_REPLICA * count, _MAX_REQUESTS)
        settings = replace(
            trace, rate=rate * count, requests=requests, arrivals=arrivals, prefixes=32 * count
        )
        result: Result = simulate(
            draw(settings), count, policy, system.cost, config=system.config,
            num_blocks=system.num_blocks, front=system.front, num_ingresses=ingresses,
        )  # fmt: skip
        yield {
            "arrivals": arrivals, "replicas": count, "ingresses": ingresses, "policy": policy,
            **result.summary(),
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
