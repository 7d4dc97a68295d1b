"""Grammars of structured outputs, by the llguidance library (github.com/guidance-ai/llguidance).

At each position a grammar allows some tokens. The sampler draws one of them, and the grammar
accepts it:

    compile       text of a grammar -> CompiledGrammar    once for equal texts
    start         CompiledGrammar -> Grammar              for each sequence; kept over a preemption
    allowed_mask  -> allowed tokens                       at each step
    accept        token -> next position                  at each step

The end-of-text token is allowed where the output may end, and is the only one where it must.

The library runs in worker processes (grammar/pool.py, sandbox/), so no grammar can end this
process, fill its memory or delay its steps. This module only sends requests: compiling continues
after `begin` has returned, and a mask arrives some time after `accept`.
"""

import functools
import hashlib
import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from nanovllm.engine.grammar.limits import PARAM, GrammarLimits
from nanovllm.engine.grammar.masks import MaskClient, MaskSequence
from nanovllm.engine.grammar.pool import GrammarPool
from nanovllm.engine.grammar.table import PooledGrammar
from nanovllm.engine.sandbox.launcher import Tokens
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError, NanovllmError
from nanovllm.structured_outputs import StructuredOutputs

LATE_S = 0.2
"""Sequences whose mask is later than this may be preempted: recomputing them costs less."""
_ROOM_WAIT_S = 0.01
_NO_END = "structured_outputs requires an end-of-text token, but the model has no eos_token_id"


class Grammar:
    """One sequence's position in a grammar. Not thread-safe."""

    def __init__(self, compiled: "CompiledGrammar", number: int) -> None:
        """Start at the first position; `number` identifies the sequence."""
        self._compiled = compiled
        self._sequence = MaskSequence(number, compiled.pooled)
        self._is_closed = False
        self._ids_mask: bytes | None = None
        self._ids = np.empty(0, dtype=np.int64)
        self._requested_s = math.inf

    @property
    def vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._compiled.grammars.vocab

    def is_late(self, now_s: float) -> bool:
        """Return whether a missing mask is so late that the sequence may be preempted."""
        return now_s - self._requested_s > LATE_S

    @property
    def is_ready(self) -> bool:
        """Whether the mask of the next token has arrived."""
        return self._mask is not None

    @property
    def _mask(self) -> bytes | None:
        """The packed mask of the next token; None until it arrives."""
        sequence = self._sequence
        return sequence.mask if sequence.tokens else sequence.grammar.first_mask

    @property
    def error(self) -> NanovllmError | None:
        """Why the mask will never arrive; None otherwise."""
        sequence = self._sequence
        return sequence.error or (None if sequence.tokens else sequence.grammar.error)

    def allowed_mask(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Wait for the mask and return it as an array of shape [vocab]. Raises `error`."""
        return unpack_mask(self._wait(), self._compiled.grammars.vocab)

    def allowed_ids(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Wait for the mask and return the allowed tokens in ascending order. Raises `error`.

        Masks often repeat, for instance inside a string, so the latest result is cached.
        """
        mask = self._wait()
        if mask != self._ids_mask:
            self._ids_mask = mask
            self._ids = np.flatnonzero(unpack_mask(mask, self._compiled.grammars.vocab))
        return self._ids

    def _wait(self) -> bytes:
        """Wait for the packed mask and return it. Raises `error`."""
        while not self.is_ready:
            if self.error is not None:
                raise self.error
            self._compiled.grammars.flush()
            self._compiled.grammars.wait(0.1)
        mask = self._mask
        assert mask is not None
        return mask

    def accept(self, token_id: int) -> None:
        """Accept a token, and queue the request for the next mask; `Grammars.flush` sends it."""
        if not self._is_closed:
            grammars = self._compiled.grammars
            self._requested_s = time.monotonic()
            self._sequence.tokens.append(token_id)
            grammars.masks.request(grammars.pool, self._sequence)

    def close(self) -> None:
        """Request no more masks."""
        if not self._is_closed:
            self._is_closed = True
            self._compiled.grammars.masks.drop(self._compiled.grammars.pool, self._sequence)


class CompiledGrammar:
    """A grammar that is compiled, or being compiled. Thread-safe.

    Deleting it cancels the compilation, for instance after its request was rejected. A compiled
    grammar stays in the pool.
    """

    def __init__(self, grammars: "Grammars", pooled: PooledGrammar, pool: GrammarPool) -> None:
        """Take ownership of one hold on `pooled`, from `pool.get`."""
        self.grammars = grammars
        self.pooled = pooled
        weakref.finalize(self, pool.drop_holder, pooled).atexit = False

    @property
    def error(self) -> NanovllmError | None:
        """Why the grammar cannot be used; None otherwise."""
        return self.pooled.error

    def start(self) -> Grammar:
        """Return the first position, for a new sequence."""
        return Grammar(self, next(self.grammars.sequence_numbers))

    def allowed_mask(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Return the mask of the first position, an array of shape [vocab]."""
        assert self.pooled.first_mask is not None
        return unpack_mask(self.pooled.first_mask, self.grammars.vocab)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` on another thread once the grammar is compiled or has failed."""
        self.grammars.pool.watch(self.pooled, watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Remove a watcher. Removing the last one cancels the compilation."""
        self.grammars.pool.unwatch(self.pooled, watcher)

    def wait(self) -> None:
        """Wait until the grammar is compiled. Raises `error`."""
        done = threading.Event()
        self.watch(done.set)
        try:
            done.wait()
        finally:
            self.unwatch(done.set)
        if self.error is not None:
            raise self.error


class Grammars:
    """The grammars of one model.

    `begin`, `compile` and `is_full` are thread-safe. All else runs on the engine's thread.
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
        self.sequence_numbers = itertools.count()
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._limits = limits or GrammarLimits()
        self._compiled: weakref.WeakValueDictionary[str, CompiledGrammar] = (
            weakref.WeakValueDictionary()
        )
        self._lock = threading.Lock()
        self.masks = MaskClient(self._limits)
        self._pool: GrammarPool | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_reset, weakref.ref(self)))

    @property
    def pool(self) -> GrammarPool:
        """The pool of workers, created on first use."""
        with self._lock:
            if self._pool is None:
                vocab = max(self.vocab, self._tokenizer.vocab)
                tokens = Tokens(self._tokenizer.as_json(), vocab, self._eos_token_ids)
                self._pool = GrammarPool(tokens, self._limits, self.masks.wake)
                self._finalizer = weakref.finalize(self, self._pool.close, waits=False)
            return self._pool

    def begin(self, spec: StructuredOutputs, client: str = "") -> CompiledGrammar:
        """Return a grammar that may still be compiling, for a request of `client`.

        Raises:
            InvalidRequestError: the model has no end-of-text token.
            QueueFullError: too many grammars wait to be compiled, most of them this client's.
        """
        if not self._eos_token_ids:
            raise InvalidRequestError(_NO_END, param=PARAM)
        key = hashlib.blake2b(spec.key.encode()).hexdigest()
        pool = self.pool
        pooled = pool.get(key, _source(spec), client)
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is None or compiled.pooled is not pooled:
                compiled = self._compiled[key] = CompiledGrammar(self, pooled, pool)
            else:
                pool.drop_holder(pooled)  # `compiled` has its own hold
            return compiled

    def compile(self, spec: StructuredOutputs, client: str = "") -> CompiledGrammar:
        """Return a grammar once it is compiled.

        Raises as `begin`, and InvalidRequestError where the grammar is invalid.
        """
        compiled = self.begin(spec, client)
        compiled.wait()
        return compiled

    def flush(self) -> None:
        """Send the mask requests that `Grammar.accept` has queued."""
        self.masks.flush()

    def poll(self, grace_s: float = 0.0) -> None:
        """Receive the masks that have arrived, or arrive within `grace_s`.

        See `MaskClient.wait_for_prompt`.
        """
        if self._pool is not None:
            self.masks.poll(self._pool)
            self.masks.wait_for_prompt(self._pool, grace_s)

    @property
    def is_full(self) -> bool:
        """Whether `begin` may soon raise QueueFullError."""
        return self._pool is not None and self._pool.is_full

    def wait_for_room(self) -> None:
        """Wait until `is_full` is false, for callers that begin any number of grammars."""
        while self.is_full:
            time.sleep(_ROOM_WAIT_S)

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for a mask or a compiled grammar, then poll."""
        self.masks.wait(timeout_s)
        self.poll()

    def reset_after_fork(self) -> None:
        """Abandon the parent's workers in a forked process, which starts its own."""
        pool, self._pool = self._pool, None
        self._lock = threading.Lock()  # another thread of the parent may hold the copy
        self._compiled = weakref.WeakValueDictionary()
        self.masks = MaskClient(self._limits)
        if pool is not None:
            self._finalizer.detach()
            pool.abandon()

    def close(self) -> None:
        """End all workers; running compilations fail with EngineNotReadyError. Idempotent."""
        with self._lock:
            pool = self._pool
        if pool is not None:
            pool.close()


def _reset(grammars: "weakref.ref[Grammars]") -> None:
    """Reset in a forked process."""
    alive = grammars()
    if alive is not None:
        alive.reset_after_fork()


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
