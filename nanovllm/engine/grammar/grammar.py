"""Grammars of structured outputs, by the llguidance library (github.com/guidance-ai/llguidance).

At each position a grammar allows some tokens. The sampler draws one of them, and the grammar
accepts it:

    for_request   text of a grammar -> RequestGrammar    for each request
    start         -> SequenceGrammar                     for each sequence; kept over a preemption
    open          begin to compile, unless it is done    when the engine has the sequence
    allowed_mask  -> allowed tokens                      at each step
    accept        token -> next position                 at each step
    path_limit    tokens to draft, with their masks      at each step, where any may be drafted
    draft         -> tokens to draft                     at each step
    close                                                when the sequence has ended

The end-of-text token is allowed where the output may end, and is the only one where it must.

The library runs in worker processes (grammar/pool.py, sandbox/), so no grammar can end this
process, fill its memory or delay its steps. This module only sends requests: compiling continues
after `open` has returned, and a mask arrives some time after `accept`.
"""

import functools
import hashlib
import itertools
import math
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.grammar.limits import PARAM, GrammarLimits
from nanovllm.engine.grammar.pool import GrammarPool
from nanovllm.engine.grammar.states import MaskSequence
from nanovllm.engine.sandbox.process import WorkerProcess
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError, setting
from nanovllm.structured_outputs import StructuredOutputs

LATE_S = 0.2
"""Sequences whose mask is later than this may be preempted: recomputing them costs less."""
_WAIT_S = 0.1
_NO_END = f"{setting(PARAM)} requires an end-of-text token, but the model has no eos_token_id"


class SequenceGrammar(MaskSequence):
    """One sequence's position in a grammar. Only the thread of the engine uses it."""

    def __init__(self, request_grammar: "RequestGrammar") -> None:
        """Start at the first position. Nothing is compiled before `open`."""
        self._grammars = request_grammar.grammars
        super().__init__(self._grammars.next_number(), request_grammar.client)
        self._request_grammar = request_grammar
        self._is_open = self._is_closed = False
        self._ids_mask: bytes | None = None
        self._ids = np.empty(0, dtype=np.int64)
        self._requested_s = math.inf

    @property
    def vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._grammars.vocab

    def open(self) -> None:
        """Begin to compile the grammar, unless it was compiled before. Idempotent."""
        if not self._is_open:
            self._is_open = True
            self._grammars.pool.add(self, self._request_grammar.key, self._request_grammar.source)

    def is_late(self, now_s: float) -> bool:
        """Return whether a missing mask is so late that the sequence may be preempted."""
        return now_s - self._requested_s > LATE_S

    @property
    def is_ready(self) -> bool:
        """Whether the mask of the next token has arrived."""
        return self.mask is not None

    def allowed_mask(self, ahead: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Wait for the mask and return it as an array of shape [vocab]. Raises `error`.

        With `ahead` it is the mask after so many tokens of `path`.
        """
        return unpack_mask(self._mask(ahead), self.vocab)

    def allowed_ids(self, ahead: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Wait for the mask and return the allowed tokens in ascending order. Raises `error`.

        Masks often repeat, for instance inside a string, so the latest result is cached. With
        `ahead` they are those after so many tokens of `path`.
        """
        mask = self._mask(ahead)
        if mask != self._ids_mask:
            self._ids_mask = mask
            self._ids = np.flatnonzero(unpack_mask(mask, self.vocab))
        return self._ids

    def _mask(self, ahead: int) -> bytes:
        return self.path_masks[ahead - 1] if ahead else self.wait()

    def draft(self, count: int) -> tuple[int, ...]:
        """Return at most `count` tokens of `path`."""
        drafted = self.path[:count]
        return tuple(itertools.takewhile(lambda token_id: 0 <= token_id < self.vocab, drafted))

    def wait(self) -> bytes:
        """Wait for the packed mask and return it. Raises `error`."""
        self.open()
        while self.mask is None:
            if self.error is not None:
                raise self.error
            self._grammars.poll()
            self._grammars.wait(_WAIT_S)
        return self.mask

    def accept(self, token_id: int) -> None:
        """Accept a token, and queue a request unless `path` has the next mask.

        `Grammars.flush` sends it.
        """
        if not self._is_closed:
            self.open()
            self._requested_s = time.monotonic()
            if self.append(token_id):
                self._grammars.pool.request(self)

    def close(self) -> None:
        """Request no more masks."""
        if self._is_open and not self._is_closed:
            self._grammars.pool.release(self)
        self._is_closed = True
        self._set_path()


@dataclass(frozen=True, slots=True, eq=False)
class RequestGrammar:
    """The grammar of a request of `client`, from which its sequences start.

    Attributes:
        key: hash of the text.
        source: {kind: value} as the worker's `compile` message has it.
    """

    grammars: "Grammars"
    key: str
    source: dict[str, object]
    client: str

    def start(self) -> SequenceGrammar:
        """Return the first position, for a new sequence."""
        return SequenceGrammar(self)


class Grammars:
    """The grammars of one model. `for_request` is thread-safe; all else is the engine's thread's.

    Attributes:
        vocab: number of logits per position.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab: int,
        eos_token_ids: Sequence[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """Start no processes yet; the first grammar does.

        Args:
            vocab: number of logits per position, at least that of tokens.
            eos_token_ids: tokens that end the output.
        """
        self.vocab = vocab
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = limits or GrammarLimits()
        self._numbers = itertools.count(1)
        self._pool: GrammarPool | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_reset, weakref.ref(self)))

    @property
    def pool(self) -> GrammarPool:
        """The pool of workers, created on first use."""
        if self._pool is None:
            vocab = max(self.vocab, self._tokenizer.vocab)
            load = {"op": "load", "n_vocab": vocab, "eos_token_ids": self._eos_token_ids}
            start = functools.partial(_start, load, self._tokenizer.as_json().encode())
            self._pool = GrammarPool(start, self._limits)
            self._finalizer = weakref.finalize(self, self._pool.close)
        return self._pool

    def for_request(self, spec: StructuredOutputs, client: str = "") -> RequestGrammar:
        """Return a grammar, not compiled yet, for a request of `client`.

        Raises InvalidRequestError where the model has no end-of-text token.
        """
        if not self._eos_token_ids:
            raise InvalidRequestError(_NO_END, param=PARAM)
        key = hashlib.blake2b(spec.key.encode()).hexdigest()
        return RequestGrammar(self, key, _source(spec), client)

    def next_number(self) -> int:
        """Return a number for a new sequence."""
        return next(self._numbers)

    @property
    def is_full(self) -> bool:
        """Whether the compile queue is more than half full."""
        is_empty = self._pool is None
        return not is_empty and self.pool.num_unsettled > self._limits.max_waiting // 2

    @property
    def is_compiling(self) -> bool:
        """Whether a worker compiles a grammar, as far as `poll` has seen."""
        return self._pool is not None and self._pool.num_compiling > 0

    def flush(self) -> None:
        """Send the mask requests that `SequenceGrammar.accept` has queued."""
        if self._pool is not None:
            self._pool.flush()

    def poll(self, grace_s: float = 0.0) -> None:
        """Receive the masks that have arrived, or arrive within `grace_s`.

        See `GrammarPool.wait_for_prompt`.
        """
        if self._pool is not None:
            self._pool.poll()
            self._pool.wait_for_prompt(grace_s)

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for a mask or a compiled grammar, then poll."""
        self.pool.wait(timeout_s)
        self.poll()

    def reset_after_fork(self) -> None:
        """Abandon the parent's workers in a forked process, which starts its own."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self._finalizer.detach()
            pool.abandon()

    def close(self) -> None:
        """End all workers; what waits for them fails with EngineNotReadyError. Idempotent."""
        if self._pool is not None:
            self._pool.close()


def _reset(grammars: "weakref.ref[Grammars]") -> None:
    """Reset in a forked process."""
    alive = grammars()
    if alive is not None:
        alive.reset_after_fork()


def _start(load: dict[str, object], tokenizer_json: bytes) -> WorkerProcess:
    """Start a worker and send it the tokenizer. Raises OSError."""
    process = WorkerProcess("nanovllm.engine.sandbox.grammar_worker")
    process.send(load, tokenizer_json)
    return process


def unpack_mask(mask: bytes, vocab: int) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Unpack one bit per token, the lowest bit of a byte first, to booleans of shape [vocab]."""
    allowed = np.zeros(vocab, dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:vocab]
    allowed[: bits.size] = bits
    return allowed


def _source(spec: StructuredOutputs) -> dict[str, object]:
    """Return {kind: value} of the grammar, as the worker's `compile` message has it."""
    if spec.json_object:
        return {"json": {"type": "object"}}
    if spec.json is not None:
        return {"closed_json" if spec.disable_additional_properties else "json": spec.json}
    kinds = ("regex", "grammar", "choice")
    return {kind: value for kind in kinds if (value := getattr(spec, kind)) is not None}
