"""Compile grammars, each in its own worker process, and keep workers for later requests.

A thread (grammar/pool_thread.py) starts, monitors and ends the workers, and never blocks on one.
It receives commands by a queue. `GrammarTable` has the states of the grammars, `GrammarLimits` the
limits of a worker.
"""

from collections.abc import Callable
from typing import Any

from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.pool_thread import PoolThread
from nanovllm.engine.grammar.table import GrammarTable, Lease, PooledGrammar
from nanovllm.engine.sandbox.launcher import Tokens


class GrammarPool:
    """Workers for the grammars of one tokenizer. Thread-safe."""

    def __init__(
        self, tokens: Tokens, limits: GrammarLimits, on_change: Callable[[], None]
    ) -> None:
        """Create the pool; the first grammar starts its thread and processes.

        `on_change` is called on the pool's thread when a grammar has changed its state.
        """
        self.limits = limits
        self._table = GrammarTable(limits.max_waiting + limits.max_compiling)
        self._thread = PoolThread(tokens, limits, self._table, on_change)
        self._commands = self._thread.commands

    def get(self, key: str, source: dict[str, Any], client: str = "") -> PooledGrammar:
        """Return a grammar for one more holder, and start compiling a new one.

        The holder calls `drop_holder` once.

        Raises:
            QueueFullError: too many grammars wait, most of them this client's.
            EngineNotReadyError: the pool is closed.
        """
        grammar, is_new, displaced = self._table.get(key, source, client)
        if displaced is not None:
            self._commands.post(lambda: self._thread.displace(displaced))
        if is_new:
            self._thread.start()
            self._commands.post(lambda: self._thread.enqueue(grammar))
        return grammar

    def drop_holder(self, grammar: PooledGrammar) -> None:
        """Remove one holder. Removing the last holder or watcher cancels the compilation.

        Takes no lock, so a finalizer may call it.
        """
        self._commands.post_unless_ended(lambda: self._thread.drop_holder(grammar))

    @property
    def is_full(self) -> bool:
        """Whether the compile queue is more than half full."""
        return self._table.num_unsettled() > self.limits.max_waiting // 2

    def acquire(self, grammar: PooledGrammar) -> Lease | None:
        """Return the grammar's worker for one more sequence.

        Returns None where there is none. A worker is then started, unless `grammar.error` is set.
        """
        lease, compiles_again = self._table.acquire(grammar)
        if compiles_again:
            self._commands.post(lambda: self._thread.enqueue(grammar))
        return lease

    def release(self, grammar: PooledGrammar, worker: int) -> None:
        """Return the worker that `acquire` gave to one sequence."""
        self._table.release(grammar, worker)

    def watch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Call `watcher` on the pool's thread once the grammar is settled."""
        self._commands.post(lambda: self._thread.watch(grammar, watcher))

    def unwatch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Remove a watcher. Removing the last one cancels the compilation."""
        self._commands.post(lambda: self._thread.unwatch(grammar, watcher))

    def end_worker(self, grammar: PooledGrammar, worker: int, limit: str = "") -> None:
        """End this worker of the grammar, because of a limit or because no sequence needs it."""
        self._commands.post(lambda: self._thread.end_worker(grammar, worker, limit))

    def slow_down(self, worker: int) -> None:
        """Give a worker the lowest priority."""
        self._commands.post(lambda: self._thread.slow_down(worker))

    def report_lost(self, grammar: PooledGrammar, worker: int) -> None:
        """Report that a worker has closed its socket."""
        self._commands.post(lambda: self._thread.check_lost(grammar, worker))

    def close(self, *, waits: bool = True) -> None:
        """End all workers, and with `waits` wait for the thread, for a while. Idempotent."""
        self._table.close()
        self._thread.end()
        if waits:
            self._thread.join()

    def abandon(self) -> None:
        """Close the inherited descriptors in a forked process; the parent keeps the pool."""
        self._table.abandon()
        self._thread.abandon()
