"""A scheduler without a network: requests of integers, and a function in the place of the network's answers."""

import random

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler, SequenceResult, StepPlan
from nanovllm.sampling_params import SamplingParams

EOS = 0


def make_request(
    name: str, prompt: int | tuple[int, ...], new: int = 4, *, priority: int = 0, prompt_logprobs: int | None = None, **params: object
) -> Request:
    """A request whose prompt tokens are unlike every other's, unless they are given."""
    tokens = prompt if isinstance(prompt, tuple) else tuple(random.Random(name).choices(range(1, 10**9), k=prompt))
    sampling = SamplingParams(max_tokens=new, prompt_logprobs=prompt_logprobs, **params)  # type: ignore[arg-type]
    return Request(
        request_id=name, prompt_token_ids=tokens, sampling=sampling, max_new_tokens=new, seed=1, priority=priority,
        stop_token_ids=frozenset({EOS}), eos_token_ids=frozenset({EOS}),
    )  # fmt: skip


def make_scheduler(*, blocks: int = 64, block_size: int = 4, seqs: int = 4, tokens: int = 16, caching: bool = True) -> Scheduler:
    return Scheduler(BlockManager(blocks, block_size, enable_prefix_caching=caching), max_num_seqs=seqs, max_num_batched_tokens=tokens)


def next_token(tokens: list[int]) -> int:
    """What a deterministic network would say: a function of everything before."""
    return 1 + hash(tuple(tokens)) % 1000


def answers(plan: StepPlan) -> list[SequenceResult[int]]:
    """The results of a step; the prompt's log-probabilities are the positions themselves."""
    return [
        SequenceResult(
            next_token(s.request.tokens) if s.samples else None, len(s.request.tokens) if s.samples else None, list(s.prompt_logprob_positions)
        )
        for s in plan.sequences
    ]


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.commit(plan, answers(plan))
    scheduler.check_integrity()
    return plan


def shares(plan: StepPlan) -> dict[str, int]:
    return {sequence.request.request_id: sequence.count for sequence in plan.sequences}


def expected_output(request: Request) -> list[int]:
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_new_tokens):
        tokens.append(next_token(tokens))
    return tokens[request.num_prompt_tokens :]
