"""Replicas in simulated time.

Each replica runs the project's own scheduler, KV cache manager and block manager, which need no
model. A step takes the time that the cost model predicts; its sampled tokens are arbitrary. Each
ingress has a router of its own, which knows the requests that it has routed. It uses the policy of
deploy/prefix_policy.py, or one of Ray Serve's: round robin, or the better of two random replicas.
"""

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Literal

import numpy as np

from benchmarks.scaling.cost_model import CostModel, FrontCost, StepSize
from benchmarks.scaling.trace import Arrival
from nanovllm.config import EngineConfig
from nanovllm.deploy.prefix import block_hashes
from nanovllm.deploy.prefix_policy import PrefixPolicy
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepPlan
from nanovllm.sampling_params import SamplingParams

Policy = Literal["round-robin", "least-loaded", "prefix"]
POLICIES: tuple[Policy, ...] = ("round-robin", "least-loaded", "prefix")
_SAMPLING = SamplingParams()


class Replica:
    """One engine in simulated time."""

    def __init__(self, config: EngineConfig, num_blocks: int, cost: CostModel) -> None:
        """Create an idle replica with `num_blocks` blocks of KV cache."""
        self.scheduler = Scheduler(
            KVCacheManager(BlockManager(num_blocks, config.block_size)),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self.num_routed = 0
        self._cost = cost
        self._plan: StepPlan | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a step is running."""
        return self._plan is not None

    def start_step(self) -> float:
        """Plan a step and return its seconds; 0 if there is nothing to compute."""
        if not self.scheduler.has_work:
            return 0.0
        self._plan = self.scheduler.schedule()
        return self._cost.seconds(step_size(self._plan))

    def end_step(self) -> list[SequenceUpdate]:
        """Commit the running step with arbitrary tokens, and return its updates."""
        plan, self._plan = self._plan, None
        assert plan is not None
        updates = [
            SequenceUpdate(sequence.request, (0,) if sequence.samples else ())
            for sequence in plan.sequences
        ]
        return self.scheduler.commit(plan, updates)


def step_size(plan: StepPlan) -> StepSize:
    """Return the size of a planned step, as the cost model counts it."""
    decodes = prompt_tokens = context = 0
    for sequence in plan.sequences:
        if sequence.request.is_decoding:
            decodes += 1
            context += sequence.start + 1
        else:
            prompt_tokens += sequence.count
            context += sequence.count * sequence.start + sequence.count * (sequence.count + 1) // 2
    return StepSize(prompt_tokens, decodes, context)


class Core:
    """A process in simulated time, for which work waits in order of arrival."""

    def __init__(self) -> None:
        """Create an idle process."""
        self.busy_s = 0.0
        self._free_s = 0.0

    def run(self, now_s: float, seconds: float) -> float:
        """Return the time at which work of `seconds` that arrives now is done."""
        self.busy_s += seconds
        self._free_s = max(self._free_s, now_s) + seconds
        return self._free_s


class Router:
    """Chooses a replica for each request of one ingress."""

    def __init__(self, policy: Policy, num_replicas: int, num_blocks: int, block_size: int) -> None:
        """Route to replicas that have `num_blocks` blocks of `block_size` tokens."""
        self._policy = policy
        self._block_size = block_size
        self._next = 0
        self._random = random.Random(num_replicas)
        self._loads = dict.fromkeys(range(num_replicas), 0.0)
        self._prefix: PrefixPolicy[int] = PrefixPolicy(max_blocks=num_blocks)
        self._prefix.set_replicas(self._loads)

    def choose(self, prompt: Sequence[int]) -> int:
        """Return the index of the replica for a prompt."""
        if self._policy == "prefix":
            hashes = block_hashes(prompt, self._block_size)
            index = self._prefix.rank(hashes, self._loads)[0]
            self._prefix.add_routed(index, hashes)
        elif self._policy == "round-robin":
            index, self._next = self._next, (self._next + 1) % len(self._loads)
        else:  # as Ray Serve's PowerOfTwoChoicesRequestRouter
            candidates = self._random.sample(range(len(self._loads)), min(2, len(self._loads)))
            index = min(candidates, key=self._loads.__getitem__)
        self._loads[index] += 1
        return index

    def end(self, index: int) -> None:
        """Count a request of a replica as finished."""
        self._loads[index] -= 1


@dataclass(slots=True)
class Result:
    """The outcome of a simulated or measured trace; times in seconds.

    Attributes:
        ttft_s: time to the first token of each request, in order of arrival.
        duration_s: from the first arrival to the last token.
        output_tokens: generated tokens.
        hit_rate: share of the prompt tokens found in a prefix cache.
        requests_per_replica: requests of each replica.
        ingress_busy: share of the time in which the busiest ingress works; simulated only.
    """

    ttft_s: list[float]
    duration_s: float
    output_tokens: int
    hit_rate: float
    requests_per_replica: list[int] = field(default_factory=list)
    ingress_busy: float = 0.0

    def summary(self) -> dict[str, float]:
        """Return throughput, TTFT percentiles, hit rate and the imbalance of the routing."""
        counts = self.requests_per_replica or [1]
        return {
            "tokens_per_s": self.output_tokens / self.duration_s,
            "ttft_p50_s": float(np.percentile(self.ttft_s, 50)),
            "ttft_p99_s": float(np.percentile(self.ttft_s, 99)),
            "hit_rate": self.hit_rate,
            "max_over_mean_requests": max(counts) * len(counts) / max(sum(counts), 1),
            "ingress_busy": self.ingress_busy,
        }


@dataclass(slots=True, eq=False)
class _Call:
    """A request on its way, and its processes by their indices."""

    arrival: Arrival
    name: str
    proxy: int
    ingress: int
    ttft_s: float = 0.0


class _Simulation:
    """A trace on its way through proxies, ingresses and replicas, by events in order of time."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        routers: Sequence[Router],
        num_proxies: int,
        front: FrontCost,
    ) -> None:
        self.replicas = replicas
        self.ingresses = [Core() for _ in routers]
        self.calls: list[_Call] = []
        self.end_s = 0.0
        self.output_tokens = 0
        self._routers = routers
        self._proxies = [Core() for _ in range(num_proxies)]
        self._front = front
        self._by_name: dict[str, _Call] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._order = count()
        self._now_s = 0.0

    def run(self, arrivals: Iterator[Arrival]) -> None:
        """Process all events."""
        self._expect(arrivals)
        while self._events:
            self._now_s, _, action = heapq.heappop(self._events)
            action()

    def _at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action))

    def _expect(self, arrivals: Iterator[Arrival]) -> None:
        """Let the next request arrive at its time."""
        arrival = next(arrivals, None)
        if arrival is not None:
            self._at(arrival.time_s, partial(self._arrive, arrival, arrivals))

    def _arrive(self, arrival: Arrival, arrivals: Iterator[Arrival]) -> None:
        number = len(self.calls)
        call = _Call(
            arrival, str(number), number % len(self._proxies), number % len(self.ingresses)
        )
        self.calls.append(call)
        self._by_name[call.name] = call
        done_s = self._proxies[call.proxy].run(self._now_s, self._front.proxy_request)
        self._at(done_s, partial(self._enter, call))
        self._expect(arrivals)

    def _enter(self, call: _Call) -> None:
        done_s = self.ingresses[call.ingress].run(self._now_s, self._front.ingress_request)
        self._at(done_s, partial(self._route, call))

    def _route(self, call: _Call) -> None:
        index = self._routers[call.ingress].choose(call.arrival.prompt)
        replica = self.replicas[index]
        replica.num_routed += 1
        replica.scheduler.add(
            Request(
                request_id=call.name,
                prompt_token_ids=call.arrival.prompt,
                sampling=_SAMPLING,
                max_new_tokens=call.arrival.output_tokens,
                seed=0,
            )
        )
        if not replica.is_busy:
            self._start_step(index)

    def _start_step(self, index: int) -> None:
        seconds = self.replicas[index].start_step()
        if seconds > 0:
            self._at(self._now_s + seconds, partial(self._end_step, index))

    def _end_step(self, index: int) -> None:
        """Send the tokens of a step on their way back, and start the next."""
        tokens: Counter[tuple[int, int]] = Counter()
        first: defaultdict[tuple[int, int], list[_Call]] = defaultdict(list)
        for result in self.replicas[index].end_step():
            call = self._by_name[result.request.request_id]
            way = call.ingress, call.proxy
            tokens[way] += len(result.token_ids)
            if result.token_ids and result.request.num_output_tokens == len(result.token_ids):
                first[way].append(call)
            if result.request.finish_reason is not None:
                self._routers[call.ingress].end(index)
        for way, number in tokens.items():
            done_s = self.ingresses[way[0]].run(self._now_s, number * self._front.ingress_token)
            self._at(done_s, partial(self._deliver, way[1], number, first[way]))
        self._start_step(index)

    def _deliver(self, proxy: int, tokens: int, first: Sequence[_Call]) -> None:
        self.output_tokens += tokens
        done_s = self._proxies[proxy].run(self._now_s, tokens * self._front.proxy_token)
        self.end_s = max(self.end_s, done_s)
        for call in first:
            call.ttft_s = done_s - call.arrival.time_s


def simulate(
    arrivals: Iterable[Arrival],
    num_replicas: int,
    policy: Policy,
    cost: CostModel,
    *,
    config: EngineConfig,
    num_blocks: int,
    front: FrontCost | None = None,
    num_ingresses: int = 1,
) -> Result:
    """Run a trace on `num_replicas` replicas, each with a proxy, behind `num_ingresses` ingresses.

    Without `front` proxies and ingresses take no time.
    """
    simulation = _Simulation(
        [Replica(config, num_blocks, cost) for _ in range(num_replicas)],
        [Router(policy, num_replicas, num_blocks, config.block_size) for _ in range(num_ingresses)],
        num_replicas,
        front or FrontCost(),
    )
    simulation.run(iter(arrivals))
    caches = [replica.scheduler.kv_cache for replica in simulation.replicas]
    queries = sum(cache.prefix_cache_queries for cache in caches)
    first_s = simulation.calls[0].arrival.time_s
    duration_s = simulation.end_s - first_s
    return Result(
        [call.ttft_s + cost.request for call in simulation.calls],
        duration_s,
        simulation.output_tokens,
        sum(cache.prefix_cache_hits for cache in caches) / max(queries, 1),
        [replica.num_routed for replica in simulation.replicas],
        max(ingress.busy_s for ingress in simulation.ingresses) / duration_s,
    )
