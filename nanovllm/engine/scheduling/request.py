"""Request: one sequence in the engine, and its states.

    WAITING --admitted--> RUNNING --done, stopped, failed--> FINISHED
       ^                     |
       +----- preempted -----+         an abort leads from WAITING or RUNNING to FINISHED

A prompt with n choices is n requests that differ in their choice index; they are called siblings.
A request contains only plain Python values, no tensors.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from nanovllm.engine.grammar.grammar import SequenceGrammar
from nanovllm.engine.scheduling.token_rules import SeenTokens, TokenRules
from nanovllm.sampling_params import SamplingParams

Pooling: TypeAlias = Literal["last", "mean"]
"""How hidden states become an embedding: the last token's state, or the mean over all tokens."""


class RequestState(Enum):
    """State of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


ALLOWED_MOVES: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


@dataclass(slots=True)
class RequestTimes:
    """Times of a sequence's events, by `time.monotonic()`, which the engine sets.

    All but `last_token_s` are set once, so other threads may read them after the event.
    """

    arrival_s: float = 0.0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence: settings, progress and blocks.

    Attributes:
        prompt_token_ids: at least one.
        max_new_tokens: maximum tokens to generate, within the context; 0 only computes the prompt.
        stop_token_ids: tokens that end the sequence, including end-of-text unless it is ignored.
        eos_token_ids: the end-of-text tokens among them, for which stop_reason is None.
        ignored_eos_token_ids: end-of-text tokens that do not end the sequence (ignore_eos). As in
            vLLM, they are banned before min_tokens too.
        bad_words: token sequences that must not be generated.
        seed: 64-bit seed, random unless the caller sets one.
        priority: lower runs first. `arrival`, which the scheduler sets, breaks ties.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        client: identity of who sent the request, for fair scheduling; empty for one caller.
        parent_id: id that all choices of a prompt have in common; empty for a single choice.
        pooling: how to embed the prompt, with max_new_tokens 0; None to generate.
        tokens: prompt and output so far.
        drafted: tokens that are expected to follow, which the next step verifies.
        seen: the distinct tokens and their counts; empty without penalties.
        grammar: state of the grammar that constrains the output; None without a constraint.
        rules: allowed, biased and banned tokens; `shared_rules` are those of a sibling.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission; None
            before it.
        num_paid_tokens: leading tokens that were computed before a preemption; recomputing them is
            not counted as service for the client.
        num_shared_tokens: prompt tokens that a sibling has computed.
        packed_settings: sampling settings as packed by batching.py; empty until first used.
        next_prompt_logprob: first prompt position whose log-probability is not reported yet.
        next_hidden: first prompt position whose hidden state is requested and not reported yet.
        block_ids: the block table.
        block_hashes: hashes of the leading full blocks that are computed so far.
        num_registered_blocks: leading blocks that were added to the prefix cache.
        num_finite_blocks: leading blocks over which attention has given finite outputs.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    seed: int
    choice_index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    ignored_eos_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str = ""
    client: str = ""
    parent_id: str = ""
    pooling: Pooling | None = None

    arrival: int = 0
    times: RequestTimes = field(default_factory=RequestTimes)
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    tokens: list[int] = field(default_factory=list)
    drafted: tuple[int, ...] = ()
    seen: SeenTokens = field(default_factory=SeenTokens)
    grammar: SequenceGrammar | None = None
    shared_rules: InitVar[TokenRules | None] = None
    rules: TokenRules = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    num_paid_tokens: int = 0
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    packed_settings: bytes = b""
    next_prompt_logprob: int = 1
    next_hidden: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_finite_blocks: int = 0

    def __post_init__(self, shared_rules: TokenRules | None) -> None:
        assert self.prompt_token_ids, "the input processor refuses empty prompts"
        assert self.pooling is None or self.max_new_tokens == 0, "an embedding has no output tokens"
        self.tokens = list(self.prompt_token_ids)
        if self.pooling == "last":
            self.next_hidden = self.num_prompt_tokens - 1
        self.rules = (
            TokenRules(self.sampling, self.bad_words) if shared_rules is None else shared_rules
        )
        if self.sampling.has_penalties:
            self.seen = SeenTokens(self.prompt_token_ids)

    @property
    def sort_key(self) -> tuple[int, int]:
        """Sort key among the requests of a client; smaller runs first."""
        return (self.priority, self.arrival)

    @property
    def writer(self) -> str:
        """Name of the request as a writer of blocks; the same for all choices of a prompt."""
        return self.parent_id or self.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt_token_ids)

    @property
    def num_reused_tokens(self) -> int:
        """Number of prompt tokens that were cached, or computed by a sibling."""
        return max(self.num_cached_tokens or 0, self.num_shared_tokens)

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Number of known tokens that are not computed yet."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.num_output_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def can_fork(self) -> bool:
        """Whether the request may share the computed prompt of a sibling."""
        is_fresh = bool(self.parent_id) and self.num_computed_tokens == 0
        return is_fresh and not self.needs_whole_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether to report log-probabilities of the prompt; only the first choice does."""
        return self.sampling.prompt_logprobs is not None and self.choice_index == 0

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token must be computed, because an output of each is reported."""
        return self.wants_prompt_logprobs or self.pooling == "mean"

    def move_to(self, state: RequestState) -> None:
        """Change the state to one that ALLOWED_MOVES permits."""
        assert state in ALLOWED_MOVES[self.state], (
            f"{self.request_id}: {self.state} cannot become {state}"
        )
        self.state = state
        if state is RequestState.FINISHED and self.grammar is not None:
            self.grammar.close()

    def append(self, token_ids: Sequence[int]) -> int:
        """Append generated tokens up to the one that ends the sequence; return their number."""
        self.drafted = ()
        for count, token_id in enumerate(token_ids, 1):
            self.tokens.append(token_id)
            if self.sampling.has_penalties:
                self.seen.add(token_id)
            num_output_tokens = self.num_output_tokens
            if token_id in self.stop_token_ids and num_output_tokens > self.sampling.min_tokens:
                self.finish_reason = FinishReason.STOP
                self.stop_reason = None if token_id in self.eos_token_ids else token_id
            elif num_output_tokens >= self.max_new_tokens:
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                return count
            if self.grammar is not None:
                self.grammar.accept(token_id)
        return len(token_ids)
