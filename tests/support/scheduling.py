"""A scheduler without a network: requests of integers, and a function for their next token."""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from nanovllm.engine.inspection.recorder import StepRecorder
from nanovllm.engine.scheduling.batching import accepted
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import MaskStates, SequenceUpdate, StepPlan
from nanovllm.engine.step_output import step_stats
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.sampling_params import SamplingParams

EOS = 0


def make_request(
    name: str,
    prompt: int | tuple[int, ...],
    new: int = 4,
    *,
    priority: int = 0,
    client: str = "",
    prompt_logprobs: int | None = None,
    **params: Any,
) -> Request:
    """A request whose prompt tokens are unlike every other's, unless they are given."""
    tokens = (
        prompt
        if isinstance(prompt, tuple)
        else tuple(random.Random(name).choices(range(1, 10**9), k=prompt))
    )
    sampling = SamplingParams(max_tokens=new, prompt_logprobs=prompt_logprobs, **params)
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=sampling,
        max_new_tokens=new,
        seed=1,
        priority=priority,
        client=client,
        stop_token_ids=frozenset({EOS}),
        eos_token_ids=frozenset({EOS}),
    )


def make_group(
    name: str, prompt: int | tuple[int, ...], count: int, new: int = 4, **settings: Any
) -> list[Request]:
    """`count` answers to one prompt, as the input_processor makes them."""
    tokens = prompt if isinstance(prompt, tuple) else make_request(name, prompt).prompt_token_ids
    requests = [
        make_request(f"{name}-{choice}", tokens, new, **settings) for choice in range(count)
    ]
    for choice, request in enumerate(requests):
        request.choice_index, request.parent_id = choice, name
    return requests


def make_scheduler(
    *,
    blocks: int = 64,
    block_size: int = 4,
    seqs: int = 4,
    tokens: int = 16,
    caching: bool = True,
    is_fair: bool = False,
) -> Scheduler:
    return Scheduler(
        KVCacheManager(BlockManager(blocks, block_size, enable_prefix_caching=caching)),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        is_fair=is_fair,
    )


def next_token(tokens: list[int], choice: int = 0) -> int:
    """Return a deterministic next token: a function of all tokens before and of the choice."""
    return 1 + hash((choice, *tokens)) % 1000


def output_tokens(tokens: Sequence[int], choice: int, count: int) -> list[int]:
    """Return the tokens that follow `tokens`."""
    known = list(tokens)
    for _ in range(count):
        known.append(next_token(known, choice))
    return known[len(tokens) :]


def draft(request: Request, count: int, wrong: int) -> None:
    """Draft the next tokens of a decoding request, of which the one with index `wrong` is wrong."""
    if request.is_decoding:
        tokens = output_tokens(request.tokens, request.choice_index, count)
        request.drafted = tuple(
            token + 5000 * (index == wrong) for index, token in enumerate(tokens)
        )


def answers(plan: StepPlan) -> list[SequenceUpdate]:
    """The results of a step; the prompt's log-probabilities name their positions."""
    results = []
    for sequence in plan.sequences:
        request = sequence.request
        drawn = (
            output_tokens(request.tokens, request.choice_index, 1 + len(sequence.drafted))
            if sequence.samples
            else []
        )
        reported = [TokenLogprobs([i], [-1.0], 1) for i in sequence.prompt_logprob_positions]
        tokens = accepted(drawn, sequence.drafted)
        results.append(SequenceUpdate(request, tokens, prompt_logprobs=reported))
    return results


def uncached_free_blocks(blocks: BlockManager) -> list[int]:
    """Blocks whose contents must never be read."""
    return [block for block in blocks._free if block not in blocks._cached]  # noqa: SLF001


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(MaskStates.read(scheduler.requests, 0.0))
    scheduler.commit(plan, answers(plan))
    scheduler.check_integrity()
    return plan


def record_step(scheduler: Scheduler, recorder: StepRecorder) -> StepPlan:
    """Run a step and record it, as the engine does."""
    plan = scheduler.schedule()
    updates = scheduler.commit(plan, answers(plan))
    recorder.on_step(plan, step_stats(plan, updates, 0.5), 1.0)
    return plan


def shares(plan: StepPlan) -> dict[str, int]:
    return {sequence.request.request_id: sequence.count for sequence in plan.sequences}


def expected_output(request: Request) -> list[int]:
    return output_tokens(request.prompt_token_ids, request.choice_index, request.max_new_tokens)


class CacheModel:
    """A KV cache that has in each slot a hash of the tokens up to the one stored there."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], int] = {}

    def run(self, plan: StepPlan) -> None:
        """Do what a step does to the cache, and look at what its queries read."""
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        before = dict(self._slots)
        for source, target in plan.copies:
            for offset in range(self._block_size):
                self._slots[target, offset] = before.get((source, offset), 0)
        for sequence in plan.sequences:
            names = _names(sequence.request, sequence.drafted)
            for position in range(sequence.start, sequence.start + sequence.count):
                self._slots[self._place(sequence.request, position)] = names[position]
        for sequence in plan.sequences:
            if sequence.count > 0:
                end = sequence.start + sequence.count
                self._check(sequence.request, end, sequence.drafted)

    def check(self, scheduler: Scheduler) -> None:
        """Every running request finds its own tokens in its blocks."""
        for request in scheduler.running:
            self._check(request, request.num_computed_tokens)

    def _check(self, request: Request, count: int, drafted: tuple[int, ...] = ()) -> None:
        names = [self._slots.get(self._place(request, position)) for position in range(count)]
        assert names == _names(request, drafted)[:count], (
            f"{request.request_id} would read what is not its own"
        )

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_ids[position // self._block_size], position % self._block_size


def _names(request: Request, drafted: tuple[int, ...] = ()) -> list[int]:
    """One number for each token and all before it."""
    return list(
        accumulate(
            (*request.tokens, *drafted),
            lambda before, token: hash((before, token)),
            initial=hash(request.cache_salt),
        )
    )[1:]
