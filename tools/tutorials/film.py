"""The recording of docs/tutorials/continuous-batching-film.md: a small engine, step by step.

A real engine serves four requests with 16 blocks of 8 tokens and a budget of 24 tokens a step. An
observer of its scheduler writes down what happens. The answers are greedy and have a fixed length,
so the plan of every step is the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import Request, RequestState
from nanovllm.engine.scheduling.step_plan import StepPlan
from nanovllm.hub.names import bundled_folder
from nanovllm.sampling_params import SamplingParams

NUM_BLOCKS, BLOCK_SIZE, BUDGET, MAX_SEQS = 16, 8, 24, 4


@dataclass(frozen=True, slots=True)
class Client:
    """A request of the film, which arrives before step `arrives` and wants `max_tokens` tokens."""

    name: str
    arrives: int
    prompt: Sequence[int]
    max_tokens: int


CLIENTS = (
    Client("A", 1, range(100, 140), 26),
    Client("B", 2, range(500, 510), 40),
    Client("C", 4, [*range(100, 132), 7, 8, 9], 30),
    Client("D", 21, range(100, 140), 8),
)


@dataclass(frozen=True, slots=True)
class Part:
    """What a step computes of a request: `count` tokens from position `start`."""

    name: str
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A block after a step: the names of its holders, and the tokens that it has for a reader.

    A block without a holder has tokens only if the prefix cache can find them.
    """

    holders: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A step: its parts, its events as sentences, and the state after it.

    Attributes:
        blocks: the blocks in the order of their ids.
        running, waiting: names of the requests.
    """

    step: int
    parts: tuple[Part, ...]
    events: tuple[str, ...]
    blocks: tuple[Block, ...]
    running: tuple[str, ...]
    waiting: tuple[str, ...]


class _Observer:
    """Writes down the events of a scheduler, and each step's parts."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.parts: tuple[Part, ...] = ()

    def on_admitted(self, request: Request) -> None:
        found = request.num_computed_tokens
        cached = f", finds {found} of its tokens cached" if found else ""
        self.events.append(f"{request.request_id} is admitted{cached}")

    def on_reused(self, request: Request, num_tokens: int) -> None:
        self.events.append(f"{request.request_id} finds {num_tokens} more tokens")

    def on_preempted(self, request: Request, cause: PreemptionCause, other: Request | None) -> None:
        assert cause is PreemptionCause.NO_FREE_BLOCK
        assert other is not None
        self.events.append(
            f"no block is free for {other.request_id}; {request.request_id} is preempted, it gives "
            f"back {len(request.block_ids)} blocks"
        )

    def on_finished(self, request: Request) -> None:
        blocks = ", ".join(map(str, reversed(request.block_ids)))
        self.events.append(f"{request.request_id} ends and frees blocks {blocks}")

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        del stats, started_s
        self.parts = tuple(
            Part(one.request.request_id, one.start, one.count, one.samples)
            for one in plan.sequences
        )


@cache
def record() -> tuple[Frame, ...]:
    """Serve the requests and return a frame of each step."""
    config = EngineConfig(
        backend="numpy",
        batch_invariant=True,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=MAX_SEQS,
        seed=0,
    )
    engine = Engine.load(bundled_folder(), config)
    clients, frames = list(CLIENTS), list[Frame]()
    while clients or engine.has_work:
        while clients and clients[0].arrives <= len(frames) + 1:
            engine.add_request(_request(clients.pop(0)))
        observer = _Observer()
        engine.scheduler.observer = observer
        engine.step()
        frames.append(_frame(len(frames) + 1, observer, engine))
    engine.close()
    return tuple(frames)


def _request(client: Client) -> Request:
    params = SamplingParams(max_tokens=client.max_tokens, temperature=0.0, ignore_eos=True)
    return Request(
        request_id=client.name,
        prompt_token_ids=tuple(client.prompt),
        sampling=params,
        max_new_tokens=client.max_tokens,
        seed=0,
    )


def _frame(step: int, observer: _Observer, engine: Engine) -> Frame:
    holders = [""] * NUM_BLOCKS
    filled = [
        BLOCK_SIZE if block in engine.blocks.cached_blocks else 0 for block in range(NUM_BLOCKS)
    ]
    for request in engine.scheduler.running:
        for index, block in enumerate(request.block_ids):
            holders[block] += request.request_id
            filled[block] = min(BLOCK_SIZE, request.num_computed_tokens - index * BLOCK_SIZE)
    blocks = zip(holders, filled, strict=True)
    return Frame(
        step,
        observer.parts,
        tuple(observer.events),
        tuple(Block(*block) for block in blocks),
        tuple(request.request_id for request in engine.scheduler.running),
        tuple(
            request.request_id
            for request in engine.scheduler.requests
            if request.state is RequestState.WAITING
        ),
    )
