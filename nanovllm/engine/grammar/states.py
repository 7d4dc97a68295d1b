"""The grammars of a pool, the sequences that use them, and their states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanovllm.engine.grammar.limits import GrammarLimits, limit_error
from nanovllm.errors import EngineFaultError, NanovllmError

MAX_ENDS = 2
"""A mask, or a grammar, that has ended so many workers fails."""
_QUICK_S = 0.1


class GrammarState(Enum):
    """State of a grammar; `TRANSITIONS` has the moves."""

    WAITING = "waiting"
    COMPILING = "compiling"
    READY = "ready"
    EVICTED = "evicted"
    FAILED = "failed"


TRANSITIONS: dict[GrammarState, frozenset[GrammarState]] = {
    GrammarState.WAITING: frozenset(
        {GrammarState.COMPILING, GrammarState.EVICTED, GrammarState.FAILED}
    ),
    GrammarState.COMPILING: frozenset(
        {GrammarState.READY, GrammarState.WAITING, GrammarState.FAILED}
    ),
    GrammarState.READY: frozenset({GrammarState.EVICTED, GrammarState.FAILED}),
    GrammarState.EVICTED: frozenset({GrammarState.WAITING, GrammarState.FAILED}),
    GrammarState.FAILED: frozenset(),
}


@dataclass(slots=True, eq=False)
class MaskSequence:
    """The masks of one sequence.

    Attributes:
        number: identifies it to the workers; positive.
        client: who requested it.
        pooled: its grammar; None before the pool has it, and where the pool has refused it.
        tokens: the tokens that it has accepted.
        mask: one bit per token for the position after `tokens`; None until it arrives.
        path, path_masks: tokens that may follow, and the mask after each of them; there are none
            while a mask is requested.
        num_forced: how many of the first tokens of `path` spell bytes that the grammar forces.
        path_limit: maximum length of the next path; 0 where none is wanted.
        ngram, prompt: what paths look up where the grammar forces nothing; see PathRequest.
        error: why no more masks arrive: that of the sequence, or of its grammar.
        num_sent: how many tokens the worker of its grammar was sent.
        num_ends: workers that ended during the mask of this position.
        cpu_s, num_masks: processor time of all its masks without those of paths, and the number of
            its masks; see `GrammarLimits.sequence_cpu_s`.
    """

    number: int
    client: str = ""
    pooled: "PooledGrammar | None" = None
    tokens: list[int] = field(default_factory=list)
    mask: bytes | None = None
    path: tuple[int, ...] = ()
    path_masks: tuple[bytes, ...] = ()
    num_forced: int = 0
    path_limit: int = 0
    ngram: tuple[int, ...] = ()
    prompt: Sequence[int] = ()
    error: NanovllmError | None = None
    num_sent: int = 0
    num_ends: int = 0
    cpu_s: float = 0.0
    num_masks: int = 0

    @property
    def needs_mask(self) -> bool:
        """Whether a worker has to compute its mask. That of the first position is the grammar's."""
        return self.mask is None and self.error is None and bool(self.tokens)

    def append(self, token_id: int) -> bool:
        """Accept a token; return whether to request a mask or a path.

        Where `path` expects the token, the mask after it is known.
        """
        self.tokens.append(token_id)
        if self.path[:1] == (token_id,):
            self.mask = self.path_masks[0]
            self.num_masks += 1
            self._set_path(self.path[1:], self.path_masks[1:], self.num_forced - 1)
        else:
            self.mask = None
            self._set_path()
        return self.mask is None or (not self.path and self.path_limit > 0)

    def store(
        self, mask: bytes, path: tuple[int, ...], path_masks: tuple[bytes, ...], num_forced: int
    ) -> None:
        """Store the mask after the tokens that were sent, and a path from there.

        Tokens that were accepted since may have followed it.
        """
        self.num_ends, later = 0, tuple(self.tokens[self.num_sent :])
        count = len(later)
        if path[:count] == later:
            self.mask = (mask, *path_masks)[count]
            self._set_path(path[count:], path_masks[count:], num_forced - count)

    def _set_path(
        self,
        path: tuple[int, ...] = (),
        path_masks: tuple[bytes, ...] = (),
        num_forced: int = 0,
    ) -> None:
        self.path, self.path_masks, self.num_forced = path, path_masks, max(num_forced, 0)

    def blame(self, limit: str | None, limits: GrammarLimits) -> None:
        """Store an error because a worker has ended, unless it may not be this mask's fault.

        A worker without memory may have spent it on the masks of others.
        """
        self.num_ends += 1
        if limit in (None, "memory") and self.num_ends < MAX_ENDS:
            return
        if limit is None:
            message = f"{self.num_ends} processes that computed the same mask have ended"
            self.error = EngineFaultError(message)
        else:
            self.error = limit_error(limit, limits)


@dataclass(slots=True, eq=False)
class PooledGrammar:
    """A grammar in the pool.

    Attributes:
        number: identifies it to the workers.
        key: hash of its text.
        source: {kind: value} as the worker's `compile` message has it.
        client: who requested it first.
        state: only `move_to` changes it.
        sequences: those that use it, by number.
        first_mask: packed mask of the first position, once compiled.
        num_bytes, cpu_s: memory that compiling added to a worker, and its processor time.
        error: why the grammar cannot be used.
        is_slow: whether other grammars have waited for its masks.
        has_paths: whether paths are computed; none are after one has ended a worker.
        num_ends: workers that ended because of it.
        since_s: time at which it began to wait.
    """

    number: int
    key: str
    source: dict[str, Any]
    client: str
    state: GrammarState = GrammarState.WAITING
    sequences: dict[int, MaskSequence] = field(default_factory=dict)
    first_mask: bytes | None = None
    num_bytes: int = 0
    cpu_s: float = 0.0
    error: NanovllmError | None = None
    is_slow: bool = False
    has_paths: bool = True
    num_ends: int = 0
    since_s: float = 0.0

    @property
    def is_settled(self) -> bool:
        """Whether it has been compiled, or has failed."""
        return self.first_mask is not None or self.error is not None

    @property
    def is_quick(self) -> bool:
        """Whether it has shown that others need not wait for it."""
        return self.first_mask is not None and self.cpu_s < _QUICK_S and not self.is_slow

    @property
    def clients(self) -> set[str]:
        """The clients whose sequences use it."""
        return {sequence.client for sequence in self.sequences.values()}

    @property
    def needs_worker(self) -> bool:
        """Whether a sequence waits for its first compilation, or for a mask."""
        if not self.is_settled:
            return bool(self.sequences)
        return any(sequence.needs_mask for sequence in self.sequences.values())

    def move_to(self, state: GrammarState) -> None:
        """Change the state."""
        assert state in TRANSITIONS[self.state], f"{self.state} to {state}"
        self.state = state

    def add(self, sequence: MaskSequence) -> None:
        """Add a sequence, which has the first mask or the error if there is one."""
        sequence.pooled = self
        sequence.mask, sequence.error = self.first_mask, self.error
        self.sequences[sequence.number] = sequence

    def set_first_mask(self, mask: bytes) -> None:
        """Store the mask of the first position, for its sequences too."""
        self.first_mask = mask
        for sequence in self.sequences.values():
            if not sequence.tokens:
                sequence.mask = mask

    def set_error(self, error: NanovllmError) -> None:
        """Store an error, for its sequences too."""
        self.move_to(GrammarState.FAILED)
        self.error, self.source = error, {}
        for sequence in self.sequences.values():
            sequence.error = sequence.error or error
