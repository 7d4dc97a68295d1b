"""One sequence that the engine works on, and the states it may be in.

    WAITING --admitted--> RUNNING --done, stopped, failed--> FINISHED
       ^                     |
       +----- preempted -----+         a request may be aborted, that is FINISHED, from every state

A prompt with n answers is n requests that differ in their choice index. Plain Python values only: the scheduler works on these
without knowing what a tensor is.
"""

from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Literal, TypeAlias

from nanovllm.engine.grammar.grammar import Grammar
from nanovllm.engine.token_rules import SeenTokens, TokenRules
from nanovllm.sampling_params import SamplingParams

Pooling: TypeAlias = Literal["last", "mean"]
"""Which final hidden states of a prompt make its embedding: the last token's, or all of them."""


class RequestState(Enum):
    """Where a request stands."""

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
    """One sequence: what was asked, how far it is, which blocks it holds.

    Attributes:
        prompt_token_ids: at least one.
        max_new_tokens: tokens to generate at most, already limited to what fits the context; 0 only reads the prompt.
        stop_token_ids: tokens that end it, end of text among them unless it is to be ignored.
        eos_token_ids: those of them that are the end of text, which is no stop_reason.
        ignored_eos_token_ids: the end of text where it does not end the answer. As in vLLM, it is
            not sampled before min_tokens either.
        bad_words: token sequences that must not be completed.
        seed: 64 bits, drawn where the caller gave none.
        priority: lower goes first. `arrival` breaks ties; the scheduler sets it.
        cache_salt: requests share cached prefixes only with those of the same salt.
        group: name of the requests that differ in their choice index alone, whose prompt is computed once for all; empty where there is one.
        pooling: the prompt's hidden states that it asks for, with `max_new_tokens` 0; None for a request that generates.
        tokens: prompt and answer so far.
        seen: its distinct tokens, where it has penalties.
        grammar: what the answer must follow, where it stands now; None for any text.
        rules: what the settings say about single tokens; `shared_rules` are those of another answer to the same prompt.
        num_computed_tokens: how many of them have their keys and values in the cache.
        num_cached_tokens: prompt tokens that were found in the prefix cache when it was first admitted; None before.
        num_shared_tokens: prompt tokens that another request of its group has computed for it.
        packed_settings: those of sampling as engine/scheduling/batching.py lays them out, from the first time they are needed.
        next_prompt_logprob: first prompt position whose log-probability has not been reported yet.
        next_hidden: first prompt position whose hidden state is wanted and has not been handed over yet.
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
    group: str = ""
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
        assert self.pooling is None or self.max_new_tokens == 0, "an embedding is of a prompt alone"
        self.tokens = list(self.prompt_token_ids)
        if self.pooling == "last":
            self.next_hidden = self.num_prompt_tokens - 1
        self.rules = (
            TokenRules(self.sampling, self.bad_words) if shared_rules is None else shared_rules
        )
        if self.sampling.has_penalties:
            self.seen = SeenTokens(self.prompt_token_ids)

    @property
    def order(self) -> tuple[int, int]:
        """What requests are served by: smaller first."""
        return (self.priority, self.arrival)

    @property
    def writer(self) -> str:
        """The name under which it computes blocks; requests of one group copy each other's, so they share one."""
        return self.group or self.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that were not computed for it."""
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
        """Whether only its newest token is left to compute."""
        return self.num_output_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether it reports log-probabilities of the prompt, so that all of it must be computed; of n answers the first does."""
        return self.sampling.prompt_logprobs is not None and self.choice_index == 0

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether something is wanted of every prompt token, so that none of them may come from the prefix cache."""
        return self.wants_prompt_logprobs or self.pooling == "mean"

    @property
    def is_blocked(self) -> bool:
        """Whether the mask of its grammar for the next token has not come yet, so that it takes no part in a step."""
        return self.grammar is not None and not self.grammar.is_ready

    @property
    def is_late(self) -> bool:
        """Whether it has been blocked for so long that others may take its place."""
        return self.grammar is not None and self.grammar.is_late

    def move_to(self, state: RequestState) -> None:
        """Change state; a move that the table does not allow is a defect of the caller."""
        assert state in ALLOWED_MOVES[self.state], (
            f"{self.request_id}: {self.state} cannot become {state}"
        )
        self.state = state
        if state is RequestState.FINISHED and self.grammar is not None:
            self.grammar.close()

    def append(self, token_id: int) -> None:
        """Add a generated token, and find out whether it is the last."""
        self.tokens.append(token_id)
        if self.sampling.has_penalties:
            self.seen.add(token_id)
        if token_id in self.stop_token_ids and self.num_output_tokens > self.sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = None if token_id in self.eos_token_ids else token_id
        elif self.num_output_tokens >= self.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.grammar is not None and self.finish_reason is None:
            self.grammar.accept(token_id)
