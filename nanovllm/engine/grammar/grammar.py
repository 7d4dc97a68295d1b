"""Grammars that answers follow, token by token, by the llguidance library (https://github.com/guidance-ai/llguidance).

A grammar says which tokens may come next; the sampler draws among those, and the grammar is told which one was drawn:

    compile  text of a grammar -> its beginning       once for equal texts
    start    beginning -> a sequence's own position   for each sequence; a preempted sequence keeps it
    allowed  position -> which tokens may follow      at each step
    accept   position, token -> the next position

Where the text may end, the end of text is among the tokens that may follow; where it must, it is the only one.

The library runs in worker processes (grammar/pool.py, sandbox/), so that no grammar can take this process down, fill its memory or
hold up its steps. What is here only asks them: compiling goes on after `begin` has returned, and the mask of the next position comes
some time after `accept`.
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
"""Age of a missing mask from which on its sequence keeps no place in the batch: being computed again costs less."""
_NO_END = "structured_outputs needs an end of text, which this model does not have (eos_token_id)"


class Grammar:
    """A position in a grammar; for one sequence and one thread."""

    def __init__(self, compiled: "CompiledGrammar", number: int) -> None:
        """Stand at the beginning."""
        self._compiled = compiled
        self._sequence = MaskSequence(number, compiled.pooled)
        self._is_closed = False
        self._ids_mask: bytes | None = None
        self._ids = np.empty(0, dtype=np.int64)
        self._asked_at_s = math.inf

    @property
    def vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._compiled.grammars.vocab

    @property
    def is_late(self) -> bool:
        """Whether the mask has been waited for so long that others may take the sequence's place meanwhile."""
        return not self.is_ready and time.monotonic() - self._asked_at_s > LATE_S

    @property
    def is_ready(self) -> bool:
        """Whether it is known which tokens may come next."""
        sequence = self._sequence
        if sequence.mask is None and not sequence.tokens:
            sequence.mask = sequence.grammar.first_mask
        return sequence.mask is not None

    @property
    def error(self) -> NanovllmError | None:
        """Why it will never be known."""
        sequence = self._sequence
        return sequence.error or (None if sequence.tokens else sequence.grammar.error)

    def allowed(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Return whether each token of the vocabulary may come next, waiting until that is known; raises `error`."""
        return unpack_mask(self._wait(), self._compiled.grammars.vocab)

    def allowed_ids(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Return the tokens that may come next, ascending, waiting as `allowed` does.

        Masks often repeat, inside a string for instance, so the latest result is kept.
        """
        mask = self._wait()
        if mask != self._ids_mask:
            self._ids_mask = mask
            self._ids = np.flatnonzero(unpack_mask(mask, self._compiled.grammars.vocab))
        return self._ids

    def _wait(self) -> bytes:
        """Return the mask of the next position once it is known; raises `error`."""
        while not self.is_ready:
            if self.error is not None:
                raise self.error
            self._compiled.grammars.flush()
            self._compiled.grammars.wait(0.1)
        assert self._sequence.mask is not None
        return self._sequence.mask

    def accept(self, token_id: int) -> None:
        """Accept a token, and queue the request for the next mask; `Grammars.flush` sends it."""
        if not self._is_closed:
            self._asked_at_s = time.monotonic()
            self._sequence.tokens.append(token_id)
            self._compiled.grammars.masks.ask(self._compiled.grammars.pool, self._sequence)

    def close(self) -> None:
        """Ask for nothing more; what is known stays known."""
        if not self._is_closed:
            self._is_closed = True
            self._compiled.grammars.masks.drop(self._compiled.grammars.pool, self._sequence)


class CompiledGrammar:
    """The beginning of a grammar, which may still be compiling. May be used from any thread.

    Deleting it ends the compilation, as when its requests have been refused; a compiled grammar
    stays in the pool.
    """

    def __init__(self, grammars: "Grammars", pooled: PooledGrammar, pool: GrammarPool) -> None:
        """Become a holder of `pooled`, which `pool.get` has returned for it."""
        self.grammars = grammars
        self.pooled = pooled
        weakref.finalize(self, pool.drop_holder, pooled).atexit = False

    @property
    def error(self) -> NanovllmError | None:
        """Why it cannot be used."""
        return self.pooled.error

    def start(self) -> Grammar:
        """Return a position of its own at the beginning."""
        return Grammar(self, next(self.grammars.numbers))

    def allowed(self) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Return whether each token of the vocabulary may come first."""
        assert self.pooled.first_mask is not None
        return unpack_mask(self.pooled.first_mask, self.grammars.vocab)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called on another thread once it is compiled or has failed, perhaps at once."""
        self.grammars.pool.watch(self.pooled, watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        """Take a watcher back: where it was the last, compiling ends at once."""
        self.grammars.pool.unwatch(self.pooled, watcher)

    def wait(self) -> None:
        """Wait until it is compiled; raises what came of it instead."""
        done = threading.Event()
        self.watch(done.set)
        try:
            done.wait()
        finally:
            self.unwatch(done.set)
        if self.error is not None:
            raise self.error


class Grammars:
    """Compiles grammars for one tokenizer. `begin` and `compile` may be called from any thread, `poll` and `wait` from the engine's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab: int,
        eos_token_ids: Sequence[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        """For a model of `vocab` tokens whose answers end with one of `eos_token_ids`."""
        self.vocab = vocab
        self.numbers = itertools.count()
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
        """The workers of this process."""
        with self._lock:
            if self._pool is None:
                vocab = max(self.vocab, self._tokenizer.vocab)
                tokens = Tokens(self._tokenizer.as_json(), vocab, self._eos_token_ids)
                self._pool = GrammarPool(tokens, self._limits, self.masks.wake)
                self._finalizer = weakref.finalize(self, self._pool.close, waits=False)
            return self._pool

    def begin(self, wanted: StructuredOutputs) -> CompiledGrammar:
        """Return a grammar that is being compiled, or is known already.

        Raises InvalidRequestError where it can be known at once that it cannot be used, QueueFullError where too many are waiting.
        """
        if not self._eos_token_ids:
            raise InvalidRequestError(_NO_END, param=PARAM)
        key = hashlib.blake2b(wanted.key.encode()).hexdigest()
        pool = self.pool
        pooled = pool.get(key, _source(wanted))
        with self._lock:
            known = self._compiled.get(key)
            if known is None or known.pooled is not pooled:
                known = self._compiled[key] = CompiledGrammar(self, pooled, pool)
            else:
                pool.drop_holder(pooled)  # `known` is its holder
            return known

    def compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        """Return the beginning of a grammar once it is compiled; raises as `begin`, and InvalidRequestError where it is none."""
        compiled = self.begin(wanted)
        compiled.wait()
        return compiled

    def flush(self) -> None:
        """Send the requests for masks that `Grammar.accept` has queued."""
        self.masks.flush()

    def poll(self, grace_s: float = 0.0) -> None:
        """Take in the masks that have come, and those that come within a moment; see `MaskClient.wait_for_prompt`."""
        if self._pool is not None:
            self.masks.poll(self._pool)
            self.masks.wait_for_prompt(self._pool, grace_s)

    @property
    def is_full(self) -> bool:
        """Whether `begin` may soon raise QueueFullError."""
        return self._pool is not None and self._pool.is_full

    def wait(self, timeout_s: float) -> None:
        """Wait for a mask, or until a grammar is compiled, no longer than `timeout_s`; then poll."""
        self.masks.wait(timeout_s)
        self.poll()

    def reset_after_fork(self) -> None:
        """Leave the workers and their sockets to the parent process; this one starts its own."""
        pool, self._pool = self._pool, None
        self._lock = threading.Lock()  # another thread of the parent may hold the copy
        self._compiled = weakref.WeakValueDictionary()
        self.masks = MaskClient(self._limits)
        if pool is not None:
            self._finalizer.detach()
            pool.abandon()

    def close(self) -> None:
        """End all workers; what is compiling fails with EngineNotReadyError. Harmless twice."""
        with self._lock:
            pool = self._pool
        if pool is not None:
            pool.close()


def _reset(grammars: "weakref.ref[Grammars]") -> None:
    """Start anew in a forked process."""
    found = grammars()
    if found is not None:
        found.reset_after_fork()


def unpack_mask(mask: bytes, vocab: int) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Return one boolean for each of `vocab` tokens, from one bit each, the lowest of a byte first."""
    allowed = np.zeros(vocab, dtype=np.bool_)
    found = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[:vocab]
    allowed[: found.size] = found
    return allowed


def _source(wanted: StructuredOutputs) -> dict[str, object]:
    """Return the one kind of grammar that is asked for, with its text."""
    if wanted.json_object:
        return {"json": {"type": "object"}}
    if wanted.json is not None:
        return {"closed_json" if wanted.disable_additional_properties else "json": wanted.json}
    kinds = ("regex", "grammar", "choice")
    return {kind: value for kind in kinds if (value := getattr(wanted, kind)) is not None}
