"""Speculator: which tokens are drafted in a step, and what has become of them.

    choose   before a step is planned: how many tokens to draft for each sequence
    draft    after it is planned: the tokens of the draft model, whose slots are known now
    observe  after it: which tokens were accepted

A drafted token is accepted exactly if it is the token that is drawn in its place, so the output is
the same as without drafts, to the last bit.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nanovllm.engine.metrics import DraftCounts
from nanovllm.engine.ngram import NgramIndex
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.step_plan import SequenceUpdate, StepPlan
from nanovllm.engine.speculation.acceptance import Acceptances
from nanovllm.engine.speculation.cost_model import (
    ModelCosts,
    Offer,
    Slowness,
    StepTimes,
    best_counts,
    best_depth,
)
from nanovllm.engine.speculation.draft_model import UNKNOWN, DraftModel
from nanovllm.speculative_config import SpeculativeConfig

_MAX_PAUSE, _PAUSE_GROWTH = 256, 4
"""Maximum steps between two trials of a draft model that did not pay, and their growth."""
_MAX_PATH_TOKENS = 256
"""Maximum tokens of the paths of all grammars in a step; each has a mask of 6 KB for GPT-2."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """What is known of a sequence.

    Attributes:
        acceptances: of its drafts.
        ngrams: its n-grams; None if they are not looked up, or with the paths of its grammar.
        found: the tokens that each source expects next; those of a grammar are "forced".
        num_forced: how many of the first tokens of a grammar's draft spell what it forces.
        source: the source that drafts in this step.
    """

    acceptances: Acceptances
    ngrams: NgramIndex | None
    found: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_forced: int = 0
    source: str = ""

    def offer(self) -> Offer:
        """Choose the source with the highest acceptance, and return what it offers."""
        of = self.acceptances.of
        self.source = max(self.found, key=of, default="")
        after = "after forced" if self.source == "forced" else self.source
        num_forced = self.num_forced if self.source == "forced" else 0
        return Offer(of(after), len(self.found.get(self.source, ())), num_forced, of("forced"))

    def learn(self, token_ids: Sequence[int]) -> None:
        """Compare what the sources expected with the tokens that came; forget it."""
        for source, expected in self.found.items():
            pairs = list(zip(expected, token_ids, strict=False))
            accepted = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            forced = min(self.num_forced, len(pairs)) if source == "forced" else len(pairs)
            self.acceptances.add(source, accepted, forced)
            self.acceptances.add("after forced", accepted - forced, len(pairs) - forced)
        self.found = {}


@dataclass(slots=True, eq=False)
class Speculator:
    """Drafts tokens for the sequences of one engine.

    Attributes:
        times: time of a step of the model by its rows.
        draft_model: None without one; `draft_times` are those of its steps.
        continuation: `KVCacheManager.continuation`.
        acceptances: of all greedy sequences (True), and of all others, which are harder to guess.
        slowness, draft_slowness: of the steps of both models.
    """

    config: SpeculativeConfig
    times: StepTimes
    continuation: Callable[[Request, int], tuple[int, ...]]
    draft_model: DraftModel | None = None
    draft_times: StepTimes | None = None
    counts: DraftCounts = field(init=False)
    acceptances: dict[bool, Acceptances] = field(
        default_factory=lambda: {is_greedy: Acceptances() for is_greedy in (True, False)}
    )
    slowness: Slowness = field(default_factory=Slowness)
    draft_slowness: Slowness = field(default_factory=Slowness)
    _sequences: dict[str, _Sequence] = field(default_factory=dict)
    _gains: dict[int, bool] = field(default_factory=lambda: {0: False})  # by number of sequences
    _pause: int = 0  # steps of `_num_paused` sequences without the draft model
    _num_paused: int = 0
    _next_pause: int = 1
    _planned_s: float = 0.0
    _catch_up_s: float = 0.0  # expected in this step

    def __post_init__(self) -> None:
        self.counts = DraftCounts.begin(self.config)

    def choose(self, running: Iterable[Request]) -> None:
        """Set the drafted tokens of the running requests for the next step."""
        decoding = [request for request in running if request.is_decoding]
        if not self._may_gain(len(decoding)):
            return
        rooms = {each.request_id: room for each in decoding if (room := self._room(each)) > 0}
        offers = {
            request.request_id: self._look_up(request, rooms[request.request_id])
            for request in decoding
            if request.request_id in rooms
        }
        counts, gain = best_counts(offers, len(decoding), self._seconds)
        for request in decoding:
            sequence, count = self._sequence(request), counts.get(request.request_id, 0)
            request.drafted = sequence.found[sequence.source][:count] if count else ()
        if self.draft_model is not None:
            # Each token that the model drafts would have to wait for a mask of a grammar.
            free = [each for each in decoding if each.grammar is None]
            self._choose_model([each for each in free if each.request_id in rooms], rooms, gain)

    def draft(self, plan: StepPlan) -> StepPlan:
        """Return a plan with the tokens of the draft model."""
        model, started_s = self.draft_model, time.perf_counter()
        self._planned_s = started_s
        if model is None:
            return plan
        sizes = [len(sequence.drafted) for sequence in plan.sequences if model.drafts(sequence)]
        if sizes:
            plan = model.draft(plan)
            assert self.draft_times is not None
            self._planned_s = time.perf_counter()
            expected_s = max(sizes) * self.draft_times.of(len(sizes)) + self._catch_up_s
            self.draft_slowness.add(len(sizes), self._planned_s - started_s, expected_s)
        return plan

    def observe(self, plan: StepPlan, updates: Sequence[SequenceUpdate]) -> None:
        """Count the accepted tokens of a step, whose `updates` were committed."""
        rows = sum(1 + len(sequence.drafted) for sequence in plan.sequences)
        if rows == plan.num_tokens:  # the step only decodes
            self.slowness.add(rows, time.perf_counter() - self._planned_s, self.times.of(rows))
        for update in updates:
            state = self._sequences.get(update.request_id)
            if state is None or not update.token_ids:
                continue
            if update.drafted:
                self.counts.add(len(update.drafted), update.num_accepted())
                update.hides_rejected = state.source == "cached"
                if state.source == "model":
                    state.found["model"] = update.drafted
            state.learn(update.token_ids)
        sampled = [each.request for each in plan.sequences if each.samples]
        self._request_paths([each for each in sampled if each.finish_reason is None])

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended."""
        self._sequences.pop(request_id, None)
        if self.draft_model is not None:
            self.draft_model.forget(request_id)

    def _seconds(self, rows: int) -> float:
        """Return the time of a step of `rows` rows."""
        return self.slowness.of(rows) * self.times.of(rows)

    def _room(self, request: Request) -> int:
        """Return how many tokens may be drafted for a request."""
        left = request.max_new_tokens - request.num_output_tokens - 1
        return min(self.config.num_speculative_tokens, left) if request.sampling.speculative else 0

    def _look_up(self, request: Request, room: int) -> Offer:
        """Find what the grammar, the n-grams or the prefix cache expect next."""
        sequence = self._sequence(request)
        found: dict[str, tuple[int, ...]] = {}
        if request.grammar is not None:
            found["forced"] = request.grammar.draft(room)
            sequence.num_forced = request.grammar.num_forced
        elif sequence.ngrams is not None:
            found["cached"] = self.continuation(request, room)
            drafted = sequence.ngrams.draft(request.tokens, room)
            found[f"{sequence.ngrams.matched}-gram"] = drafted
        sequence.found = {source: tokens for source, tokens in found.items() if tokens}
        return sequence.offer()

    def _request_paths(self, requests: Sequence[Request]) -> None:
        """Have the grammars find what may be drafted for requests that have a new token."""
        may_gain = self._may_gain(len(requests))
        for request in requests:
            if request.grammar is not None:
                self._sequence(request)
                limit = min(self._room(request), _MAX_PATH_TOKENS // len(requests))
                request.grammar.path_limit = max(limit, 0) if may_gain else 0

    def _may_gain(self, num_sequences: int) -> bool:
        """Whether a step of so many sequences would gain if all drafted tokens were accepted."""
        if num_sequences not in self._gains:
            every = Offer(1.0, self.config.num_speculative_tokens)
            offers = {str(number): every for number in range(num_sequences)}
            self._gains[num_sequences] = bool(best_counts(offers, num_sequences, self.times.of)[0])
        return self._gains[num_sequences]

    def _choose_model(
        self, requests: Sequence[Request], rooms: dict[str, int], least_gain: float
    ) -> None:
        """Let the draft model draft for all of `requests`, if that gains more than `least_gain`."""
        assert self.draft_model is not None
        assert self.draft_times is not None
        self._pause = max(self._pause - 1, 0)
        if not requests or (self._pause and len(requests) == self._num_paused):
            return
        missing = [self.draft_model.num_missing(request) - 1 for request in requests]
        longest = self.draft_times.rows[-1]
        slowness = self.draft_slowness.of(len(requests))
        self._catch_up_s = self.draft_times.of(longest) * sum(missing) / longest
        costs = ModelCosts(
            slowness * self.draft_times.of(len(requests)),
            slowness * self._catch_up_s,
            sum(request.max_new_tokens - request.num_output_tokens for request in requests),
        )
        depth = best_depth(
            [
                Offer(self._sequence(each).acceptances.of("model"), rooms[each.request_id])
                for each in requests
            ],
            self._seconds,
            costs,
            least_gain,
        )
        self._num_paused = len(requests)
        if depth:
            self._next_pause, self._pause = 1, 0
        elif self._pause == 0:
            self._next_pause = self._pause = min(_PAUSE_GROWTH * self._next_pause, _MAX_PAUSE)
            depth = int(costs.catch_up_s < self._seconds(len(requests)))  # a trial
        if depth:
            for request in requests:
                self._sequence(request).source = "model"
                request.drafted = (UNKNOWN,) * min(depth, rooms[request.request_id])

    def _sequence(self, request: Request) -> _Sequence:
        """Return what is known of a request."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            ngram = self.config.prompt_lookup_min, self.config.prompt_lookup_max
            uses_ngrams = self.config.uses_ngrams and request.sampling.speculative
            if request.grammar is not None and uses_ngrams:
                request.grammar.ngram = ngram
                request.grammar.prompt = request.tokens[: request.num_prompt_tokens]
            looks_up = uses_ngrams and request.grammar is None
            every = self.acceptances[request.sampling.is_greedy]
            sequence = self._sequences[request.request_id] = _Sequence(
                Acceptances(every), NgramIndex(*ngram) if looks_up else None
            )
        return sequence
