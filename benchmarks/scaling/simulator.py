"""Replicas in simulated time.

Each replica runs the project's own scheduler, KV cache manager and block manager, which need no
model. A step takes the time that the cost model predicts; its sampled tokens are arbitrary. The
router uses the policy of deploy/prefix_policy.py, or a simpler one to compare with.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from benchmarks.scaling.cost_model import CostModel, StepSize
from benchmarks.scaling.trace import Arrival
from nanovllm.config import EngineConfig
from nanovllm.deploy.prefix import block_hashes
from nanovllm.deploy.prefix_policy import PrefixPolicy
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import SequenceResult, StepPlan
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
        self.unfinished = 0
        self.num_routed = 0
        self.busy_s = 0.0
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
        seconds = self._cost.seconds(step_size(self._plan))
        self.busy_s += seconds
        return seconds

    def end_step(self) -> list[SequenceResult]:
        """Commit the running step with arbitrary tokens, and return its results."""
        plan, self._plan = self._plan, None
        assert plan is not None
        results = [
            SequenceResult(sequence.request, (0,) if sequence.samples else ())
            for sequence in plan.sequences
        ]
        return self.scheduler.commit(plan, results)


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


class Router:
    """Chooses a replica for each request."""

    def __init__(self, policy: Policy, replicas: Sequence[Replica], block_size: int) -> None:
        """Route to `replicas`, whose blocks have `block_size` tokens."""
        self._policy = policy
        self._replicas = replicas
        self._block_size = block_size
        self._next = 0
        self._prefix: PrefixPolicy[int] = PrefixPolicy()
        self._prefix.set_replicas(range(len(replicas)))

    def choose(self, prompt: Sequence[int]) -> int:
        """Return the index of the replica for a prompt."""
        if self._policy == "round-robin":
            index, self._next = self._next, (self._next + 1) % len(self._replicas)
            return index
        loads = {index: float(one.unfinished) for index, one in enumerate(self._replicas)}
        hashes = block_hashes(prompt, self._block_size) if self._policy == "prefix" else ()
        index = self._prefix.rank(hashes, loads)[0]
        self._prefix.add_routed(index, hashes)
        return index


@dataclass(slots=True)
class Result:
    """The outcome of a simulated or measured trace; times in seconds.

    Attributes:
        ttft_s: time to the first token of each request, in order of arrival.
        duration_s: from the first arrival to the last token.
        output_tokens: generated tokens.
        hit_rate: share of the prompt tokens found in a prefix cache.
        requests_per_replica: requests of each replica.
    """

    ttft_s: list[float]
    duration_s: float
    output_tokens: int
    hit_rate: float
    requests_per_replica: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return throughput, TTFT percentiles, hit rate and the imbalance of the routing."""
        counts = self.requests_per_replica or [1]
        return {
            "tokens_per_s": self.output_tokens / self.duration_s,
            "ttft_p50_s": float(np.percentile(self.ttft_s, 50)),
            "ttft_p99_s": float(np.percentile(self.ttft_s, 99)),
            "hit_rate": self.hit_rate,
            "max_over_mean_requests": max(counts) * len(counts) / max(sum(counts), 1),
        }


def simulate(
    arrivals: Iterable[Arrival],
    num_replicas: int,
    policy: Policy,
    cost: CostModel,
    *,
    config: EngineConfig,
    num_blocks: int,
) -> Result:
    """Run a trace on `num_replicas` replicas.

    Two kinds of events are processed in order of time: the arrival of a request, and the end of a
    replica's step.
    """
    replicas = [Replica(config, num_blocks, cost) for _ in range(num_replicas)]
    router = Router(policy, replicas, config.block_size)
    steps: list[tuple[float, int]] = []  # a heap of (end, replica)
    began_s: dict[str, float] = {}
    ttft_s: dict[str, float] = {}
    pending = iter(arrivals)
    upcoming = next(pending, None)
    first_s = upcoming.time_s if upcoming is not None else 0.0
    now, output_tokens = first_s, 0

    def start_step(index: int) -> None:
        seconds = replicas[index].start_step()
        if seconds > 0:
            heapq.heappush(steps, (now + seconds, index))

    while upcoming is not None or steps:
        if upcoming is not None and (not steps or upcoming.time_s <= steps[0][0]):
            now = upcoming.time_s
            index = router.choose(upcoming.prompt)
            name = str(len(began_s))
            began_s[name] = now - cost.request
            replica = replicas[index]
            replica.unfinished += 1
            replica.num_routed += 1
            replica.scheduler.add(
                Request(
                    request_id=name,
                    prompt_token_ids=upcoming.prompt,
                    sampling=_SAMPLING,
                    max_new_tokens=upcoming.output_tokens,
                    seed=0,
                )
            )
            if not replica.is_busy:
                start_step(index)
            upcoming = next(pending, None)
            continue
        now, index = heapq.heappop(steps)
        for result in replicas[index].end_step():
            output_tokens += len(result.token_ids)
            name = result.request.request_id
            if result.token_ids and name not in ttft_s:
                ttft_s[name] = now - began_s[name]
            if result.request.finish_reason is not None:
                replicas[index].unfinished -= 1
        start_step(index)
    caches = [replica.scheduler.kv_cache for replica in replicas]
    queries = sum(cache.prefix_cache_queries for cache in caches)
    return Result(
        [ttft_s[name] for name in began_s],
        now - first_s,
        output_tokens,
        sum(cache.prefix_cache_hits for cache in caches) / max(queries, 1),
        [replica.num_routed for replica in replicas],
    )
