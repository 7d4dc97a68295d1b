"""One sequence that the engine works on, and its states.

    WAITING --admitted--> RUNNING --done, stopped, failed--> FINISHED
       ^                     |
       +----- preempted -----+         an abort leads from every state to FINISHED

A prompt with n choices is n requests that differ in their choice index. Requests hold plain Python
values only, no tensors.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from nanovllm.engine.grammar.grammar import Grammar
from nanovllm.engine.scheduling.token_rules import SeenTokens, TokenRules
from nanovllm.sampling_params import SamplingParams

Pooling: TypeAlias = Literal["last", "mean"]
"""Final hidden states that make a prompt's embedding: the last token's, or the mean of all."""


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


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One sequence: its settings, its progress and its blocks.

    Attributes:
        prompt_token_ids: at least one.
        max_new_tokens: most tokens to generate, within the context; 0 only reads the prompt.
        stop_token_ids: tokens that end the sequence, with end of text unless it is ignored.
        eos_token_ids: those of them that are the end of text, which is no stop_reason.
        ignored_eos_token_ids: the end of text where it does not end the sequence. As in vLLM, it is
            not sampled before min_tokens either.
        bad_words: token sequences that must not be completed.
        seed: 64 bits, random unless the caller gave one.
        priority: lower goes first. `arrival`, which the scheduler sets, breaks ties.
        cache_salt: requests share cached prefixes only with those of the same salt.
        parent_id: id of the prompt, whose choices compute it once; empty for a single choice.
        pooling: hidden states of the prompt to report, with max_new_tokens 0; None to generate.
        tokens: prompt and output so far.
        seen: the distinct tokens, where the request has penalties.
        grammar: state of the grammar that the output must follow; None for any text.
        rules: settings about single tokens; `shared_rules` are those of a sibling.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission; None
            before it.
        num_shared_tokens: prompt tokens that a sibling has computed for it.
        packed_settings: sampling settings as batching.py packs them, once they are needed.
        next_prompt_logprob: first prompt position whose log-probability is not reported yet.
        next_hidden: first prompt position whose hidden state is wanted and not reported yet.
        block_ids: the block table.
        block_hashes: hashes of its leading full blocks.
        num_registered_blocks: leading blocks that are in the prefix cache.
        num_proven_blocks: leading blocks that were read with finite results.
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
    parent_id: str = ""
    pooling: Pooling | None = None

    arrival: int = 0
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    tokens: list[int] = field(default_factory=list)
    seen: SeenTokens = field(default_factory=SeenTokens)
    grammar: Grammar | None = None
    shared_rules: InitVar[TokenRules | None] = None
    rules: TokenRules = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    packed_settings: bytes = b""
    next_prompt_logprob: int = 1
    next_hidden: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered_blocks: int = 0
    num_proven_blocks: int = 0

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
        """What requests are ordered by: smaller first."""
        return (self.priority, self.arrival)

    @property
    def writer(self) -> str:
        """Name under which it computes blocks, the same for all choices of a prompt."""
        return self.parent_id or self.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that were not computed for this request."""
        return max(self.num_cached_tokens or 0, self.num_shared_tokens)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that still need the forward pass."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        return self.num_output_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def can_fork(self) -> bool:
        """Whether it may take the computed prompt of a sibling."""
        is_fresh = bool(self.parent_id) and self.num_computed_tokens == 0
        return is_fresh and not self.needs_whole_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether it reports log-probabilities of the prompt: the first of the choices does."""
        return self.sampling.prompt_logprobs is not None and self.choice_index == 0

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether it reports something of every prompt token, so that none may be cached."""
        return self.wants_prompt_logprobs or self.pooling == "mean"

    @property
    def is_blocked(self) -> bool:
        """Whether it cannot run because its grammar's mask for the next token is missing."""
        return self.grammar is not None and not self.grammar.is_ready

    @property
    def is_late(self) -> bool:
        """Whether it has been blocked for so long that it may be preempted."""
        return self.grammar is not None and self.grammar.is_late

    def move_to(self, state: RequestState) -> None:
        """Change the state to one that ALLOWED_MOVES permits."""
        assert state in ALLOWED_MOVES[self.state], (
            f"{self.request_id}: {self.state} cannot become {state}"
        )
        self.state = state
        if state is RequestState.FINISHED and self.grammar is not None:
            self.grammar.close()

    def append(self, token_ids: Sequence[int]) -> int:
        """Append generated tokens up to the one that ends the sequence; return how many."""
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
