"""StepRecorder: the last steps of an engine as tuples.

A recorder is the observer of a scheduler while somebody watches. A small model computes a step in
300 us, and code that runs once a step finds cold caches, so recording a step only keeps its plan
and a few numbers. The sequences are added for a few steps at a time, which also releases the
requests of the plans. Records contain only immutable values, so other threads may read them.
"""

from collections import deque
from itertools import islice, takewhile
from operator import eq
from typing import Literal, NamedTuple, TypeAlias

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.observer import PreemptionCause
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.step_plan import PlannedSequence, StepPlan

MAX_RECORDS = 512
_MAX_RECENT = 32
"""Recorded steps whose sequences are added together."""
Kind: TypeAlias = Literal["prefill", "chunk", "decode", "fork"]


class StepSequence(NamedTuple):
    """The tokens of one request in a step: `num_tokens` tokens from position `start`.

    The last `num_drafted` of them were drafted, and `num_accepted` of these accepted. The kind is
    "decode" for the newest token and those drafted after it, "prefill" for all tokens that are
    left, "chunk" for a part of them, and "fork" for a choice that samples from the prompt of
    another choice.
    """

    request_id: str
    choice_index: int
    start: int
    num_tokens: int
    kind: Kind
    num_drafted: int = 0
    num_accepted: int = 0


class Preemption(NamedTuple):
    """A preemption, as of the moment before the blocks were freed.

    Attributes:
        step: number of the step that was being planned or committed.
        other_id: id of the request that caused it, if any.
        num_computed_tokens, num_blocks: tokens and blocks that the request lost.
    """

    request_id: str
    step: int
    cause: PreemptionCause
    other_id: str | None
    num_computed_tokens: int
    num_blocks: int


class _Events(NamedTuple):
    """Events since the step before: see StepRecord."""

    admitted: tuple[str, ...] = ()
    preempted: tuple[Preemption, ...] = ()
    finished: tuple[tuple[str, FinishReason], ...] = ()
    cache_hits: tuple[tuple[str, int], ...] = ()


_NO_EVENTS = _Events()


class StepRecord(NamedTuple):
    """One step, and the events since the step before it.

    Attributes:
        step: number of the step, from 1.
        started_s: start of the step, by `time.monotonic()`.
        num_tokens, num_prompt_tokens, num_decode_tokens: as in StepStats.
        mixed: all sequences, unless the step only decodes, without drafts.
        decoding: (id, choice index) of all sequences of such a step; consecutive records share the
            tuple while it stays the same.
        decode_starts: position of the token of each of them.
        events: admitted requests, preemptions, (id, reason) of the requests that ended, and
            (id, number of tokens) of those that found computed blocks.
        num_copies: number of blocks that were copied (copy-on-write).
        num_used_blocks, num_cached_blocks, num_free_blocks: blocks after the step that requests
            hold, that only the prefix cache can find, and that are empty.
    """

    step: int
    started_s: float
    duration_s: float
    num_tokens: int
    num_prompt_tokens: int
    num_decode_tokens: int
    mixed: tuple[StepSequence, ...]
    decoding: tuple[tuple[str, int], ...]
    decode_starts: tuple[int, ...]
    events: _Events
    num_copies: int
    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_cached_blocks: int
    num_free_blocks: int

    @property
    def sequences(self) -> tuple[StepSequence, ...]:
        """All sequences of the step."""
        decoding = zip(self.decoding, self.decode_starts, strict=True)
        return self.mixed or tuple(
            StepSequence(request_id, choice, start, 1, "decode")
            for (request_id, choice), start in decoding
        )


class StepRecorder:
    """Records the last MAX_RECORDS steps of a scheduler. For the thread of its engine.

    Attributes:
        num_steps: number of the last step.
        preemptions: the last preemption of each unfinished request, by its id.
    """

    def __init__(self, scheduler: Scheduler, num_steps: int) -> None:
        """Record the steps after step `num_steps`."""
        self.num_steps = num_steps
        self.preemptions: dict[str, Preemption] = {}
        self._scheduler = scheduler
        # The last steps, whose records have no sequences yet.
        self._recent: list[tuple[StepRecord, StepPlan]] = []
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._events = _NO_EVENTS
        self._requests: list[Request] = []  # those that decoded in the last recorded step
        self._decoding: tuple[tuple[str, int], ...] = ()

    def last(self, count: int) -> tuple[StepRecord, ...]:
        """Return at most `count` of the latest records, oldest first."""
        self._add_sequences()
        return tuple(islice(reversed(self._records), count))[::-1]

    def on_admitted(self, request: Request) -> None:
        """Record an admission, and the tokens that it found in computed blocks."""
        events = self._events
        self._events = events._replace(admitted=(*events.admitted, request.request_id))
        if request.num_computed_tokens:
            self.on_reused(request, request.num_computed_tokens)

    def on_reused(self, request: Request, num_tokens: int) -> None:
        """Record the tokens that a request found in computed blocks."""
        events = self._events
        hit = (request.request_id, num_tokens)
        self._events = events._replace(cache_hits=(*events.cache_hits, hit))

    def on_preempted(self, request: Request, cause: PreemptionCause, other: Request | None) -> None:
        """Record a preemption as numbers; reasons.py describes it."""
        preemption = Preemption(
            request.request_id,
            self.num_steps + 1,
            cause,
            None if other is None else other.request_id,
            request.num_computed_tokens,
            len(request.block_ids),
        )
        events = self._events
        self._events = events._replace(preempted=(*events.preempted, preemption))
        self.preemptions[request.request_id] = preemption

    def on_finished(self, request: Request) -> None:
        """Record the end of a request."""
        assert request.finish_reason is not None
        events, end = self._events, (request.request_id, request.finish_reason)
        self._events = events._replace(finished=(*events.finished, end))
        self.preemptions.pop(request.request_id, None)

    def on_step(self, plan: StepPlan, stats: StepStats, started_s: float) -> None:
        """Record a step and the events since the step before it."""
        self.num_steps += 1
        scheduler, blocks = self._scheduler, self._scheduler.kv_cache.blocks
        record = StepRecord(
            self.num_steps,
            started_s,
            stats.duration_s,
            stats.num_tokens,
            stats.num_prompt_tokens,
            stats.num_decode_tokens,
            (),
            (),
            (),
            self._events,
            len(plan.copies),
            len(scheduler.running),
            scheduler.num_waiting,
            blocks.num_used,
            blocks.num_cached,
            blocks.num_free - blocks.num_cached,
        )
        self._recent.append((record, plan))
        self._events = _NO_EVENTS
        if len(self._recent) >= _MAX_RECENT:
            self._add_sequences()

    def _add_sequences(self) -> None:
        """Complete the recent records by the sequences of their plans."""
        recent, self._recent = self._recent, []
        for record, plan in recent:
            if record.num_prompt_tokens or record.num_tokens > len(plan.sequences):
                self._records.append(record._replace(mixed=tuple(map(_sequence, plan.sequences))))
                continue
            requests = [sequence.request for sequence in plan.sequences]
            if requests != self._requests:
                self._requests = requests
                self._decoding = tuple(
                    [(request.request_id, request.choice_index) for request in requests]
                )
            starts = tuple([sequence.start for sequence in plan.sequences])
            self._records.append(record._replace(decoding=self._decoding, decode_starts=starts))


def _sequence(sequence: PlannedSequence) -> StepSequence:
    """Return the record of a planned sequence, whose request may have got a token since."""
    request, start, count = sequence.request, sequence.start, sequence.count
    is_prompt_end = request.max_new_tokens == 0 and start + count == request.num_prompt_tokens
    kind: Kind = "chunk"
    if count == 0:
        kind = "fork"
    elif sequence.is_decoding:
        kind = "decode"
    elif sequence.samples or is_prompt_end:
        kind = "prefill"
    drafted, drawn = sequence.drafted, request.tokens[start + 1 : start + count]
    num_accepted = sum(takewhile(bool, map(eq, drafted, drawn)))
    return StepSequence(
        request.request_id, request.choice_index, start, count, kind, len(drafted), num_accepted
    )
