"""InspectedEngine: a frozen copy of an engine's requests, blocks and statistics.

`inspect_engine` runs on the engine's thread between two steps. The result contains only immutable
values, so any thread may read it.
"""

import time
from bisect import bisect, insort
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from nanovllm.engine.engine import Engine
from nanovllm.engine.inspection.reasons import (
    WAITS_FOR_MASK,
    first_reason,
    later_reason,
    preemption_reason,
    running_reason,
)
from nanovllm.engine.inspection.recorder import StepRecord, StepRecorder
from nanovllm.engine.metrics import EngineSnapshot
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.request import Request, RequestState
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import NO_MASKS_MISSING, MaskStates

MAX_REQUESTS = 256
MAX_CELLS = 4096
FREE, CACHED, FIRST_OWNER = 0, 1, 2
"""Cell values; -k is a block that k requests share, FIRST_OWNER + i one that requests[i] holds."""
Phase: TypeAlias = Literal["prefill", "decode", "queued", "preempted", "blocked"]


class InspectedRequest(NamedTuple):
    """One unfinished request, with the names of its JSON.

    Attributes:
        phase: "prefill" and "decode" for running requests, "queued" and "preempted" for waiting
            ones, and "blocked" for either if it cannot run although there is room.
        age_s: time since the request arrived.
        computed_tokens: tokens whose keys and values are in the KV cache.
        reused_tokens: prompt tokens that were cached, or computed by another choice.
        preemptions: how often it was preempted.
        reason: why it waits or was preempted; None if it is part of every step.
        prompt_token_ids: None unless prompts are shown.
    """

    id: str
    choice: int
    state: Literal["running", "waiting"]
    phase: Phase
    priority: int
    age_s: float
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    max_tokens: int
    reused_tokens: int
    preemptions: int
    num_blocks: int
    reason: str | None
    prompt_token_ids: tuple[int, ...] | None


class InspectedBlocks(NamedTuple):
    """The blocks of the KV cache.

    Attributes:
        used: blocks that requests hold; `shared` are those that at least two requests hold.
        cached: blocks that no request holds and the prefix cache can find; `free` are the others.
        cells: runs of equal cells, each (value, length).
        blocks_per_cell: 1, or more if there are more than MAX_CELLS blocks; such a cell shows
            its most used block.
    """

    total: int
    used: int
    cached: int
    free: int
    shared: int
    cells: tuple[tuple[int, int], ...]
    blocks_per_cell: int


@dataclass(frozen=True, slots=True)
class InspectedEngine:
    """The state of an engine between two steps.

    Attributes:
        num_steps: number of the last step.
        uptime_s: time since the engine was created.
        started_s: creation of the engine, by `time.monotonic()`.
        requests: running requests in their order, then waiting ones; at most MAX_REQUESTS.
        num_omitted: number of unfinished requests beyond them.
        steps: records of the last steps, oldest first.
        stats: the statistics at this moment.
        build_s: processor time that this copy has taken on the engine's thread.
    """

    num_steps: int
    uptime_s: float
    started_s: float
    is_paused: bool
    requests: tuple[InspectedRequest, ...]
    num_omitted: int
    blocks: InspectedBlocks
    steps: tuple[StepRecord, ...]
    stats: EngineSnapshot
    build_s: float


def inspect_engine(
    engine: Engine,
    recorder: StepRecorder | None,
    *,
    max_steps: int,
    is_paused: bool = False,
    shows_prompts: bool = False,
) -> InspectedEngine:
    """Copy the state of an engine; call it on the engine's thread.

    Args:
        max_steps: maximum number of step records.
        shows_prompts: include the prompts' token ids.
    """
    began_s, now = time.thread_time(), time.monotonic()
    scheduler = engine.scheduler
    requests = inspect_requests(
        scheduler,
        recorder,
        engine.mask_states(),
        now_s=now,
        is_paused=is_paused,
        shows_prompts=shows_prompts,
    )
    return InspectedEngine(
        num_steps=engine.num_steps,
        uptime_s=now - engine.started_s,
        started_s=engine.started_s,
        is_paused=is_paused,
        requests=requests,
        num_omitted=len(scheduler.requests) - len(requests),
        blocks=inspect_blocks(engine.blocks, sorted(scheduler.running, key=scheduler.queues.key)),
        steps=() if recorder is None else recorder.last(max_steps),
        stats=engine.stats(),
        build_s=time.thread_time() - began_s,
    )


def inspect_requests(
    scheduler: Scheduler,
    recorder: StepRecorder | None,
    masks: MaskStates = NO_MASKS_MISSING,
    *,
    now_s: float = 0.0,
    is_paused: bool = False,
    shows_prompts: bool = False,
) -> tuple[InspectedRequest, ...]:
    """Copy the first MAX_REQUESTS unfinished requests at the time `now_s`."""
    running = sorted(scheduler.running, key=scheduler.queues.key)
    waiting = [request for request in scheduler.requests if request.state is RequestState.WAITING]
    waiting.sort(key=scheduler.queues.key)
    inspected = []
    for request in islice(running, MAX_REQUESTS):
        reason = running_reason(request, scheduler, masks)
        phase: Phase = "decode" if request.is_decoding else "prefill"
        phase = phase if reason is None else "blocked"
        inspected.append(_inspect_request(request, phase, reason, now_s, shows_prompts))
    first_id = obstacle = ""
    arrivals: list[int] = []  # of the requests ahead in the queue
    for request in islice(waiting, MAX_REQUESTS - len(inspected)):
        phase = "preempted" if request.num_preemptions else "queued"
        if request.request_id in masks.blocked:
            reason, phase = WAITS_FOR_MASK, "blocked"
        elif not arrivals:
            reason = obstacle = first_reason(request, scheduler, is_paused=is_paused)
            first_id = request.request_id
        else:
            is_fair = scheduler.queues.is_fair
            later = len(arrivals) - bisect(arrivals, request.arrival) if is_fair else 0
            reason = later_reason(first_id, obstacle, len(arrivals), later)
        if phase != "blocked":
            insort(arrivals, request.arrival)
        preemption = None if recorder is None else recorder.preemptions.get(request.request_id)
        if preemption is not None:
            reason = f"{preemption_reason(preemption)}; now: {reason}"
        inspected.append(_inspect_request(request, phase, reason, now_s, shows_prompts))
    return tuple(inspected)


def inspect_blocks(blocks: BlockManager, running: list[Request]) -> InspectedBlocks:
    """Copy the state of the blocks; `running` are the requests that hold them, in their order."""
    values = np.zeros(blocks.num_blocks, dtype=np.int64)
    values[np.fromiter(blocks.cached_blocks, np.int64, len(blocks.cached_blocks))] = CACHED
    tables = [request.block_ids for request in running]
    held = np.fromiter(chain.from_iterable(tables), np.int64, sum(map(len, tables)))
    owners = np.repeat(np.arange(len(tables)) + FIRST_OWNER, [len(table) for table in tables])
    used, first, counts = np.unique(held, return_index=True, return_counts=True)
    is_shared = counts > 1
    values[used] = np.where(is_shared, -counts, owners[first])
    blocks_per_cell = -(-blocks.num_blocks // MAX_CELLS)
    num_used = blocks.num_used
    return InspectedBlocks(
        total=blocks.num_blocks,
        used=num_used,
        cached=blocks.num_cached,
        free=blocks.num_free - blocks.num_cached,
        shared=int(np.count_nonzero(is_shared)),
        cells=_runs(_merge(values, blocks_per_cell)),
        blocks_per_cell=blocks_per_cell,
    )


def _merge(values: npt.NDArray[np.int64], per_cell: int) -> npt.NDArray[np.int64]:
    """Return one value for each `per_cell` blocks: shared before owned, cached and free."""
    if per_cell == 1:
        return values
    padded = np.zeros(-(-len(values) // per_cell) * per_cell, dtype=np.int64)
    padded[: len(values)] = values
    # Reducing the first axis of a contiguous array is many times as fast as the short second one.
    cells = np.ascontiguousarray(padded.reshape(-1, per_cell).T)
    lowest: npt.NDArray[np.int64] = cells.min(axis=0)
    highest: npt.NDArray[np.int64] = cells.max(axis=0)
    return np.where(lowest < 0, lowest, highest)


def _runs(values: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return the runs of equal values, each (value, length)."""
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    lengths = np.diff(starts, append=len(values))
    return tuple(zip(values[starts].tolist(), lengths.tolist(), strict=True))


def _inspect_request(
    request: Request,
    phase: Phase,
    reason: str | None,
    now_s: float,
    shows_prompts: bool,
) -> InspectedRequest:
    return InspectedRequest(
        request.request_id,
        request.choice_index,
        "running" if request.state is RequestState.RUNNING else "waiting",
        phase,
        request.priority,
        now_s - request.times.arrival_s,
        request.num_prompt_tokens,
        request.num_computed_tokens,
        request.num_output_tokens,
        request.max_new_tokens,
        request.num_reused_tokens,
        request.num_preemptions,
        len(request.block_ids),
        reason,
        request.prompt_token_ids if shows_prompts else None,
    )
