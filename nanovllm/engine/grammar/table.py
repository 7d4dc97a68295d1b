"""The grammars of a pool, and their states.

    WAITING --> COMPILING --> READY <--> EVICTED
                    |
                    +-------> FAILED

An EVICTED grammar has lost its worker: it was idle when another grammar needed a worker, or its
worker ended. It is compiled again when a sequence needs it. A FAILED grammar is not compiled again.

The table is thread-safe. Its methods hold the lock briefly, and none waits for a worker.
"""

import contextlib
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanovllm.engine.sandbox.messages import MessageReader
from nanovllm.engine.shares import Shares
from nanovllm.errors import EngineNotReadyError, InvalidRequestError, NanovllmError, QueueFullError

_MAX_WITHOUT_WORKER = 512  # grammars without a worker whose first mask or error is kept


class Connection:
    """The parent's end of a worker's socket.

    It closes once nothing refers to it, so never while another thread reads from it.
    """

    __slots__ = ("socket",)

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def __del__(self) -> None:
        self.socket.close()

    def cut(self) -> None:
        """Shut the connection down: a reader sees the end of the stream."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker that a sequence may use."""

    worker: int
    connection: Connection


class GrammarState(Enum):
    """State of a grammar; see the top of this file."""

    WAITING = "waiting"
    COMPILING = "compiling"
    READY = "ready"
    EVICTED = "evicted"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class PooledGrammar:
    """A grammar in the pool. The pool's thread writes it, except for `holders` and `users`.

    Attributes:
        key: hash of its text.
        source: {kind: value} as the worker's `compile` message has it.
        client: who requested it first.
        worker: number of its latest worker; each worker has a new number.
        connection: socket of its worker, None without one. While the grammar is READY, only the
            engine's thread reads and writes it.
        holders: number of requests that may use the grammar, with or without a worker.
        users: number of sequences that need the worker.
        first_mask: packed mask of the first position, once compiled.
        num_bytes: private memory of the worker.
        error: why the grammar cannot be used.
        lost_by: limit that ended the latest worker, "" for another cause; None while it runs.
        since_s: time at which it began to wait or to compile.
        watchers: called on the pool's thread once the grammar is settled.
    """

    key: str
    source: dict[str, Any]
    client: str = ""
    state: GrammarState = GrammarState.WAITING
    worker: int = -1
    connection: Connection | None = None
    reader: MessageReader = field(default_factory=MessageReader)
    holders: int = 0
    users: int = 0
    first_mask: bytes | None = None
    num_bytes: int = 0
    error: NanovllmError | None = None
    lost_by: str | None = None
    since_s: float = 0.0
    watchers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether it has been compiled, or has failed."""
        return self.first_mask is not None or self.error is not None


def stopped_error() -> EngineNotReadyError:
    """Return the error of a grammar whose pool was closed."""
    return EngineNotReadyError("the engine was stopped")


class GrammarTable:
    """The grammars of one pool, the least recently used first."""

    def __init__(self, max_unsettled: int) -> None:
        """Create an empty table; at most `max_unsettled` grammars may wait or compile."""
        self._max_unsettled = max_unsettled
        self._lock = threading.RLock()  # a finalizer may call `close` while this thread holds it
        self._grammars: OrderedDict[str, PooledGrammar] = OrderedDict()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether the pool was closed."""
        return self._is_closed

    def close(self) -> bool:
        """Accept no more grammars. Return whether this is the first call."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            return not was_closed

    def get(
        self, key: str, source: dict[str, Any], client: str
    ) -> tuple[PooledGrammar, bool, PooledGrammar | None]:
        """Return the grammar of this key for one more holder, and whether it is new.

        Where too many grammars wait, the newest one of the client with most is removed and returned
        too; the caller cancels it.

        Raises:
            EngineNotReadyError: the table is closed.
            QueueFullError: too many grammars wait, most of them this client's.
        """
        with self._lock:
            if self._is_closed:
                raise stopped_error()
            grammar = self._grammars.get(key)
            if grammar is not None:
                self._grammars.move_to_end(key)
                grammar.holders += 1
                return grammar, False, None
            displaced = self._make_place(client)
            grammar = self._grammars[key] = PooledGrammar(key, source, client, holders=1)
            self._trim()
            return grammar, True, displaced

    def _make_place(self, client: str) -> PooledGrammar | None:
        """Remove and return a waiting grammar where there are too many; raises QueueFullError."""
        unsettled = [grammar for grammar in self._grammars.values() if not grammar.is_settled]
        if len(unsettled) < self._max_unsettled:
            return None
        shares = Shares(self._max_unsettled, (grammar.client for grammar in unsettled))
        largest = shares.displaced(client)
        for grammar in reversed(unsettled):
            if grammar.client == largest and grammar.state is GrammarState.WAITING:
                self.remove(grammar)
                return grammar
        raise QueueFullError(
            f"{len(unsettled)} grammars of other requests wait to be compiled, the limit; "
            "try again later"
        )

    def num_unsettled(self) -> int:
        """Return the number of grammars that wait or compile for the first time."""
        with self._lock:
            return sum(not grammar.is_settled for grammar in self._grammars.values())

    def _trim(self) -> None:
        """Remove the least recently used grammars that have no worker."""
        idle_keys = [
            key
            for key, grammar in self._grammars.items()
            if grammar.state in (GrammarState.EVICTED, GrammarState.FAILED)
        ]
        for key in idle_keys[: max(0, len(idle_keys) - _MAX_WITHOUT_WORKER)]:
            del self._grammars[key]

    def acquire(self, grammar: PooledGrammar) -> tuple[Lease | None, bool]:
        """Return the grammar's worker for one more sequence, and whether to compile it again."""
        with self._lock:
            if grammar.state is GrammarState.READY and grammar.connection is not None:
                grammar.users += 1
                return Lease(grammar.worker, grammar.connection), False
            if grammar.state is not GrammarState.EVICTED:
                return None, False
            if self._is_closed:
                grammar.state, grammar.error = GrammarState.FAILED, stopped_error()
                return None, False
            grammar.state = GrammarState.WAITING
            self._grammars[grammar.key] = grammar
            return None, True

    def release(self, grammar: PooledGrammar, worker: int) -> None:
        """Return the worker that `acquire` gave to a sequence."""
        with self._lock:
            if grammar.worker == worker and grammar.users:
                grammar.users -= 1

    # For the pool's thread ----------------------------------------------------------------------

    def drop_holder(self, grammar: PooledGrammar) -> bool:
        """Remove one holder. Return whether the grammar was removed, since nobody needs it."""
        with self._lock:
            grammar.holders -= 1
            if grammar.holders or grammar.watchers or grammar.is_settled:
                return False
            self.remove(grammar)
            return True

    def set_compiling(self, grammar: PooledGrammar, worker: int, connection: Connection) -> None:
        """Give a grammar a new worker."""
        with self._lock:
            grammar.worker, grammar.connection = worker, connection
            grammar.state, grammar.lost_by = GrammarState.COMPILING, None

    def set_ready(self, grammar: PooledGrammar, num_bytes: int, first_mask: bytes) -> None:
        """Store the result of a compilation."""
        with self._lock:
            grammar.num_bytes, grammar.first_mask = num_bytes, first_mask
            grammar.state, grammar.users = GrammarState.READY, 0

    def set_waiting(self, grammar: PooledGrammar) -> None:
        """Mark a grammar as waiting for another worker."""
        with self._lock:
            grammar.state = GrammarState.WAITING

    def set_lost(self, grammar: PooledGrammar, limit: str) -> None:
        """Store the limit that ended a grammar's worker."""
        with self._lock:
            grammar.lost_by, grammar.state, grammar.users = limit, GrammarState.EVICTED, 0

    def set_failed(self, grammar: PooledGrammar, error: NanovllmError) -> None:
        """Store an error, and keep the grammar only if a retry would give the same error."""
        with self._lock:
            grammar.error, grammar.state, grammar.source = error, GrammarState.FAILED, {}
            if not isinstance(error, InvalidRequestError):
                self.remove(grammar)

    def take_connection(self, grammar: PooledGrammar) -> Connection | None:
        """Remove and return a grammar's connection, so that no more sequences use it."""
        with self._lock:
            connection, grammar.connection = grammar.connection, None
            return connection

    def abandon(self) -> None:
        """Close in a forked process, where another thread may have held the lock."""
        self._lock = threading.RLock()
        self._is_closed = True

    def remove(self, grammar: PooledGrammar) -> None:
        """Remove a grammar; the next request for it compiles it again."""
        with self._lock:
            if self._grammars.get(grammar.key) is grammar:
                del self._grammars[grammar.key]

    def evict(self, is_enough: Callable[[list[PooledGrammar]], bool]) -> list[PooledGrammar]:
        """Evict idle grammars, the least recently used first, until `is_enough(evicted)`.

        Returns the evicted grammars; the caller ends their workers.
        """
        with self._lock:
            idle = [
                grammar
                for grammar in self._grammars.values()
                if grammar.state is GrammarState.READY and not grammar.users
            ]
            evicted: list[PooledGrammar] = []
            while len(evicted) < len(idle) and not is_enough(evicted):
                grammar = idle[len(evicted)]
                grammar.state, grammar.lost_by = GrammarState.EVICTED, ""
                evicted.append(grammar)
            return evicted
