"""Compiles grammars, each in a worker process of its own, and keeps workers for later requests.

A thread (grammar/pool_thread.py) starts, watches and ends the workers; it never waits for one of
them. Its commands come by a queue. `GrammarTable` has the states of the grammars, `GrammarLimits`
what a worker may use.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.pool_thread import PoolThread
from nanovllm.engine.grammar.table import GrammarTable, Lease, PooledGrammar
from nanovllm.engine.sandbox.launcher import Tokens


class GrammarPool:
    """Workers for the grammars of one tokenizer. Any thread may call its methods."""

    def __init__(
        self, tokens: Tokens, limits: GrammarLimits, on_change: Callable[[], None]
    ) -> None:
        """Create the pool; the first grammar starts its thread and processes.

        `on_change` is called on the pool's thread when a grammar has changed its state.
        """
        self.limits = limits
        self._table = GrammarTable(limits.max_waiting + limits.max_compiling)
        self._thread = PoolThread(tokens, limits, self._table, on_change)

    def get(self, key: str, source: dict[str, Any]) -> PooledGrammar:
        """Return a grammar for one more holder; compiling a new one begins.

        The holder calls `drop_holder` once.

        Raises QueueFullError when too many wait, EngineNotReadyError when the pool is closed.
        """
        grammar, is_new = self._table.get(key, source)
        if is_new:
            self._thread.start()
            self._thread.post(lambda: self._thread.enqueue(grammar))
        return grammar

    def drop_holder(self, grammar: PooledGrammar) -> None:
        """Remove one holder. Without any other holder or watcher, compiling ends.

        Takes no lock, so a finalizer may call it.
        """
        self._thread.post_unless_ended(lambda: self._thread.drop_holder(grammar))

    @property
    def is_full(self) -> bool:
        """Whether more than half of the grammars wait that may."""
        return self._table.num_unsettled() > self.limits.max_waiting // 2

    @property
    def is_compiling(self) -> bool:
        """Whether a worker compiles."""
        return self._thread.is_compiling

    def acquire(self, grammar: PooledGrammar) -> Lease | None:
        """Return the grammar's worker for one more sequence.

        Without a worker return None: one is started, or `grammar.error` says why not.
        """
        lease, compiles_again = self._table.acquire(grammar)
        if compiles_again:
            self._thread.post(lambda: self._thread.enqueue(grammar))
        return lease

    def release(self, grammar: PooledGrammar, worker: int) -> None:
        """Take back what `acquire` gave to one sequence."""
        self._table.release(grammar, worker)

    def watch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Call `watcher` on the pool's thread once the grammar is settled, perhaps at once."""
        self._thread.post(lambda: self._thread.watch(grammar, watcher))

    def unwatch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Remove a watcher. Without any other watcher, compiling ends at once."""
        self._thread.post(lambda: self._thread.unwatch(grammar, watcher))

    def end_worker(self, grammar: PooledGrammar, worker: int, limit: str = "") -> None:
        """End this worker of the grammar: it has reached a limit, or no sequence needs it."""
        self._thread.post(lambda: self._thread.end_worker(grammar, worker, limit))

    def slow_down(self, worker: int) -> None:
        """Give a worker the lowest priority."""
        self._thread.post(lambda: self._thread.slow_down(worker))

    def report_lost(self, grammar: PooledGrammar, worker: int) -> None:
        """Report that the worker's socket has closed."""
        self._thread.post(lambda: self._thread.check_lost(grammar, worker))

    def close(self, *, waits: bool = True) -> None:
        """End all workers, and wait for that unless told not to. Harmless twice."""
        self._table.close()
        self._thread.end()
        if waits:
            self._thread.join()

    def abandon(self) -> None:
        """Close the descriptors that a forked process has inherited; the parent uses the pool."""
        self._table.abandon()
        self._thread.abandon()
