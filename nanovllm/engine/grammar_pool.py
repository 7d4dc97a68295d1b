"""Compiles grammars, each in a worker process of its own, and keeps the workers of those that may be needed again.

    WAITING --> COMPILING --> READY <--> EVICTED         a grammar that is needed again is compiled again
                    |           a request uses it, or nobody does: then its worker may be ended
                    +-------> FAILED                     the same text is not tried again

A thread starts, watches and ends the workers; it never waits for one of them. Others talk to it by a queue. The lock is held for
looking into the cache, never while something is compiled. What a worker may use is in `GrammarLimits`.
"""

import contextlib
import logging
import queue
import selectors
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nanovllm.engine.sandbox.launcher import Launcher, Tokens, launcher
from nanovllm.engine.sandbox.limits import reached_limit
from nanovllm.engine.sandbox.messages import MessageError, MessageReader, pack
from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    NanovllmError,
    QueueFullError,
)

logger = logging.getLogger(__name__)

PARAM = "structured_outputs"
_MAX_KNOWN = 512  # grammars without a worker whose first mask or error is remembered
_START_S = 60.0  # loading the library and the tokenizer, on a machine that has other work


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """What grammars may use.

    Attributes:
        memory_bytes: that compiling one may add to a process.
        compile_cpu_s, mask_cpu_s: processor time for compiling one, and for one mask.
        compile_wall_s, mask_wall_s: the same on the clock, for systems without a limit of processor time, and for a worker that hangs.
        request_cpu_s, request_cpu_s_per_mask: processor time for all masks of a sequence: a sum, and so much more for each mask.
        max_compiling: compiled at once.
        max_waiting, max_wait_s: waiting to be compiled, and how long.
        max_workers, max_bytes: processes kept, and the memory that they have together.
    """

    memory_bytes: int = 256 << 20
    compile_cpu_s: float = 5.0
    compile_wall_s: float = 30.0
    mask_cpu_s: float = 1.0
    mask_wall_s: float = 20.0
    request_cpu_s: float = 10.0
    request_cpu_s_per_mask: float = 0.005
    max_compiling: int = 2
    max_waiting: int = 64
    max_wait_s: float = 30.0
    max_workers: int = 32
    max_bytes: int = 1 << 30


class Connection:
    """Our end of a worker's socket. It is closed when nobody refers to it, so never while another thread reads from it."""

    __slots__ = ("socket",)

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def __del__(self) -> None:
        self.socket.close()

    def cut(self) -> None:
        """End the connection: a reader finds the end of the stream."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class GrammarState(Enum):
    """Where a grammar stands; see the top of this file."""

    WAITING = "waiting"
    COMPILING = "compiling"
    READY = "ready"
    EVICTED = "evicted"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class PooledGrammar:
    """A grammar in the pool. The pool's thread writes all but `users`, which is changed under the pool's lock.

    Attributes:
        key: its text, shortened to a hash.
        source: {kind: value} as grammar_worker takes it.
        worker: number of its latest worker, another one each time.
        connection: to the worker; while READY the engine's thread alone reads and writes.
        users: sequences that need the worker.
        first_mask: of the beginning, once it has been compiled.
        num_bytes: memory that the worker has added to what it shares.
        error: why it cannot be used.
        lost_by: limit that ended the latest worker in the middle of its work, "" for another end; None where none was.
        watchers: called on the pool's thread when it has been compiled, or never will be.
    """

    key: str
    source: dict[str, Any]
    state: GrammarState = GrammarState.WAITING
    worker: int = -1
    connection: Connection | None = None
    reader: MessageReader = field(default_factory=MessageReader)
    users: int = 0
    first_mask: bytes | None = None
    num_bytes: int = 0
    error: NanovllmError | None = None
    lost_by: str | None = None
    since_s: float = 0.0
    watchers: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether it has been compiled, or never will be."""
        return self.first_mask is not None or self.error is not None


class GrammarPool:
    """Workers for the grammars of one tokenizer. Any thread may call its methods."""

    def __init__(
        self, tokens: Tokens, limits: GrammarLimits, on_change: Callable[[], None]
    ) -> None:
        """Start nothing yet; `on_change` is called on the pool's thread when a grammar has changed its state."""
        self.limits = limits
        self._tokens = tokens
        self._on_change = on_change
        self._lock = threading.RLock()  # a finalizer may come in between
        self._grammars: OrderedDict[str, PooledGrammar] = OrderedDict()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # Of the thread:
        self._selector = selectors.DefaultSelector()
        self._launcher: Launcher | None = None
        self._is_loaded = False
        self._launched_s = 0.0
        self._waiting: deque[PooledGrammar] = deque()
        self._compiling: dict[int, PooledGrammar] = {}
        self._workers: dict[int, PooledGrammar] = {}
        self._numbers = 0

    def get(self, key: str, source: dict[str, Any]) -> PooledGrammar:
        """Return a grammar, which is compiled from now on if it is not known; raises QueueFullError."""
        with self._lock:
            if self._is_closed:
                raise EngineNotReadyError("the engine was stopped")
            grammar = self._grammars.get(key)
            if grammar is not None:
                self._grammars.move_to_end(key)
                return grammar
            waiting = self._num_unsettled()
            if waiting >= self.limits.max_waiting + self.limits.max_compiling:
                raise QueueFullError(
                    f"{waiting} grammars of other requests wait to be compiled; try again later"
                )
            grammar = self._grammars[key] = PooledGrammar(key, source)
            self._trim()
            self._start_thread()
        self._post(lambda: self._enqueue(grammar))
        return grammar

    @property
    def is_full(self) -> bool:
        """Whether half of the grammars wait that may."""
        with self._lock:
            return self._num_unsettled() > self.limits.max_waiting // 2

    @property
    def is_compiling(self) -> bool:
        """Whether a worker compiles."""
        return bool(self._compiling)

    def _num_unsettled(self) -> int:
        return sum(not grammar.is_settled for grammar in self._grammars.values())

    def acquire(self, grammar: PooledGrammar) -> bool:
        """Whether a sequence may use the grammar's worker now; if not, it is made ready, or `error` says why not."""
        with self._lock:
            if grammar.state is GrammarState.READY:
                grammar.users += 1
                return True
            again = grammar.state is GrammarState.EVICTED and not self._is_closed
            if again:
                grammar.state = GrammarState.WAITING
                self._grammars[grammar.key] = grammar
        if again:
            self._post(lambda: self._enqueue(grammar))
        return False

    def release(self, grammar: PooledGrammar, worker: int) -> None:
        """A sequence needs this worker of the grammar no longer."""
        with self._lock:
            if grammar.worker == worker and grammar.users:
                grammar.users -= 1

    def watch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Have `watcher` called on the pool's thread once the grammar is settled, perhaps at once."""
        self._post(lambda: self._watch(grammar, watcher))

    def unwatch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Take a watcher back. Where nobody else watches, compiling ends at once."""
        self._post(lambda: self._unwatch(grammar, watcher))

    def end_worker(self, grammar: PooledGrammar, worker: int, limit: str = "") -> None:
        """End this worker of the grammar: it has reached a limit, or computes for nobody."""
        self._post(lambda: self._end_worker(grammar, worker, limit))

    def slow_down(self, worker: int) -> None:
        """Give a worker only the processor time that nobody else wants."""
        self._post(lambda: self._launcher.slow_down(worker) if self._launcher else None)

    def report_lost(self, grammar: PooledGrammar, worker: int) -> None:
        """The worker's socket has closed."""
        self._post(lambda: self._look_after(grammar, worker))

    def close(self, *, waits: bool = True) -> None:
        """End all workers, and wait for that unless told not to. Harmless twice."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            thread = self._thread
        if thread is None:
            self._close_sockets()
            return
        if not was_closed:
            self._post(lambda: None)
        if waits and thread is not threading.current_thread():
            thread.join()

    def _trim(self) -> None:
        """Forget the oldest grammars that have no worker where there are many."""
        without = [
            key
            for key, grammar in self._grammars.items()
            if grammar.state in (GrammarState.EVICTED, GrammarState.FAILED)
        ]
        for key in without[: max(0, len(without) - _MAX_KNOWN)]:
            del self._grammars[key]

    def _start_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nanovllm-grammars", daemon=True)
            self._thread.start()

    def _post(self, command: Callable[[], None]) -> None:
        """Have the thread do something."""
        self._commands.put(command)
        with contextlib.suppress(BlockingIOError, OSError):  # it is awake, or has ended
            self._wake.send(b".")

    # On the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain)
        try:
            while not self._is_closed:
                for key, _ in self._selector.select(self._next_look_s()):
                    key.data()
                self._launch_waiting()
                self._check_times()
        except Exception:
            logger.exception("the thread that watches over grammars has broken down")
        finally:
            self._is_closed = True
            self._end_all(EngineNotReadyError("the engine was stopped"))
            self._drain()
            self._close_sockets()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _close_sockets(self) -> None:
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _next_look_s(self) -> float | None:
        return 0.25 if self._waiting or self._compiling else None

    def _enqueue(self, grammar: PooledGrammar) -> None:
        grammar.since_s = time.monotonic()
        if self._is_closed:
            self._settle(grammar, EngineNotReadyError("the engine was stopped"))
        else:
            self._waiting.append(grammar)

    def _watch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        if grammar.is_settled:
            watcher()
        else:
            grammar.watchers.append(watcher)

    def _unwatch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        if watcher in grammar.watchers:
            grammar.watchers.remove(watcher)
            if not grammar.watchers and not grammar.is_settled:
                self._forget(grammar)

    def _forget(self, grammar: PooledGrammar) -> None:
        """End the compilation of a grammar that nobody waits for any more."""
        with self._lock:
            if self._grammars.get(grammar.key) is grammar:
                del self._grammars[grammar.key]
        if grammar in self._waiting:
            self._waiting.remove(grammar)
        self._disconnect(grammar)
        self._settle(grammar, QueueFullError("the grammar was given up; try again"))

    def _launch_waiting(self) -> None:
        """Start workers for the first that wait, as many as may be compiled at once and as there is room for."""
        if self._waiting and self._launcher is None:
            self._start_launcher()
        while (
            self._waiting
            and self._is_loaded
            and len(self._compiling) < self.limits.max_compiling
            and self._make_room()
        ):
            self._launch(self._waiting.popleft())

    def _start_launcher(self) -> None:
        self._is_loaded, self._launched_s = False, time.monotonic()
        try:
            self._launcher = launcher(self._tokens)
        except OSError as error:
            self._fail_waiting(
                EngineFaultError(f"a process for grammars cannot be started: {error}")
            )
            return
        connection = self._launcher.connection
        if connection is None:
            self._is_loaded = True
        else:
            self._selector.register(connection, selectors.EVENT_READ, self._read_launcher)

    def _read_launcher(self) -> None:
        if self._launcher is None:
            return
        for event in self._launcher.read():
            if event["op"] == "loaded":
                self._is_loaded = True
            elif event["op"] == "failed":
                self._fail_waiting(_unknown_tokenizer(event["message"]))
            elif event["op"] == "exited":
                grammar = self._workers.get(event["id"])
                if grammar is not None and event["id"] in self._compiling:
                    self._receive(grammar)  # it may have said why
                if grammar is not None and self._workers.get(event["id"]) is grammar:
                    self._lose(grammar, reached_limit(event["code"]) or "")
            elif event["op"] == "closed":
                self._close_launcher()
                return

    def _close_launcher(self) -> None:
        """The process that forks has ended, and its workers with it; the next grammar starts another."""
        if self._launcher is not None:
            if self._launcher.connection is not None:
                self._selector.unregister(self._launcher.connection)
            self._launcher.close()
        self._launcher, self._is_loaded = None, False
        for grammar in list(self._workers.values()):
            self._lose(grammar, "")
        if time.monotonic() - self._launched_s < 1.0:  # do not try for ever
            self._fail_waiting(EngineFaultError("the process that compiles grammars has ended"))

    def _fail_waiting(self, error: NanovllmError) -> None:
        while self._waiting:
            self._settle(self._waiting.popleft(), error)

    def _make_room(self) -> bool:
        """End idle workers, the least recently used first, until one more fits; False where the others are in use."""
        limits = self.limits
        with self._lock:
            idle = [
                grammar
                for grammar in self._grammars.values()
                if grammar.state is GrammarState.READY and not grammar.users
            ]
            num_bytes = sum(grammar.num_bytes for grammar in self._workers.values())
            num_bytes += limits.memory_bytes * (len(self._compiling) + 1)
            num_workers = len(self._workers) + 1
            ended: list[PooledGrammar] = []
            while idle and (num_workers > limits.max_workers or num_bytes > limits.max_bytes):
                grammar = idle.pop(0)
                grammar.state = GrammarState.EVICTED
                num_workers, num_bytes = num_workers - 1, num_bytes - grammar.num_bytes
                ended.append(grammar)
        for grammar in ended:
            self._disconnect(grammar)
        return num_workers <= limits.max_workers and (
            num_bytes <= limits.max_bytes or num_workers == 1
        )

    def _launch(self, grammar: PooledGrammar) -> None:
        assert self._launcher is not None
        limits = self.limits
        header = {
            "op": "compile", "grammar": grammar.source, "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.compile_cpu_s, "mask_cpu_s": limits.mask_cpu_s,
        }  # fmt: skip
        self._numbers += 1
        try:
            connection = self._launcher.start(self._numbers)
            grammar.connection = Connection(connection)
            connection.settimeout(_START_S)
            connection.sendall(pack(header))
            connection.setblocking(False)
        except OSError as error:
            self._disconnect(grammar)
            self._settle(grammar, EngineFaultError(f"a grammar cannot be compiled: {error}"))
            return
        grammar.worker, grammar.reader, grammar.lost_by = self._numbers, MessageReader(), None
        grammar.state, grammar.since_s = GrammarState.COMPILING, time.monotonic()
        self._workers[grammar.worker] = self._compiling[grammar.worker] = grammar
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._receive(grammar))

    def _receive(self, grammar: PooledGrammar) -> None:
        """Take what a worker says about its compilation."""
        if grammar.connection is None:
            return  # ended by what was read before this
        try:
            data = grammar.connection.socket.recv(1 << 16)
            messages = list(grammar.reader.feed(data))
        except BlockingIOError:
            return
        except (OSError, MessageError):
            data, messages = b"", []
        if not data:
            self._look_after(grammar, grammar.worker)
        for header, body in messages:
            if header["op"] == "compiled":
                self._finish_compiling(grammar, header["num_bytes"], body)
            elif header["op"] == "failed":
                self._disconnect(grammar)
                self._settle(grammar, _unknown_tokenizer(header["message"]))
            elif header["op"] == "invalid":
                self._disconnect(grammar)
                self._settle(grammar, not_usable(header["message"]))

    def _finish_compiling(self, grammar: PooledGrammar, num_bytes: int, mask: bytes) -> None:
        assert grammar.connection is not None
        self._stop_reading(grammar)
        del self._compiling[grammar.worker]
        grammar.num_bytes, grammar.first_mask = num_bytes, mask
        with self._lock:
            grammar.state, grammar.users = GrammarState.READY, 0
        self._settle(grammar, None)

    def _look_after(self, grammar: PooledGrammar, worker: int) -> None:
        """A worker's socket has closed. A forked worker's end is reported; of another one it is found out here."""
        if self._workers.get(worker) is not grammar or self._launcher is None:
            return
        self._stop_reading(grammar)
        if self._launcher.connection is None:
            self._lose(grammar, reached_limit(self._launcher.exit_code(worker)) or "")

    def _stop_reading(self, grammar: PooledGrammar) -> None:
        if grammar.connection is not None:
            with contextlib.suppress(KeyError):  # the engine's thread reads, or nobody does
                self._selector.unregister(grammar.connection.socket)

    def _end_worker(self, grammar: PooledGrammar, worker: int, limit: str) -> None:
        if self._workers.get(worker) is grammar:
            self._lose(grammar, limit)

    def _lose(self, grammar: PooledGrammar, limit: str) -> None:
        """A worker has ended, or must: while it compiled that is the end of the grammar, later only of the worker."""
        was_compiling = grammar.state is GrammarState.COMPILING
        self._disconnect(grammar)
        with self._lock:
            grammar.lost_by, grammar.state, grammar.users = limit, GrammarState.EVICTED, 0
        if not was_compiling:
            self._on_change()
        elif limit:
            self._settle(grammar, not_usable(describe_limit(limit, self.limits)))
        else:
            self._settle(grammar, EngineFaultError("the process that compiled the grammar ended"))

    def _disconnect(self, grammar: PooledGrammar) -> None:
        """End a grammar's worker, if it has one."""
        self._stop_reading(grammar)
        self._compiling.pop(grammar.worker, None)
        if self._workers.pop(grammar.worker, None) is not None and self._launcher is not None:
            self._launcher.kill(grammar.worker)
        if grammar.connection is not None:
            grammar.connection.cut()
            grammar.connection = None

    def _settle(self, grammar: PooledGrammar, error: NanovllmError | None) -> None:
        """Tell those who wait; what can be tried again is not kept."""
        if error is not None:
            with self._lock:
                grammar.error, grammar.state, grammar.source = error, GrammarState.FAILED, {}
                is_final = isinstance(error, InvalidRequestError)
                if self._grammars.get(grammar.key) is grammar and not is_final:
                    del self._grammars[grammar.key]
        watchers, grammar.watchers = grammar.watchers, []
        for watcher in watchers:
            watcher()
        self._on_change()

    def _check_times(self) -> None:
        """End what takes too long."""
        now = time.monotonic()
        if self._launcher is not None and not self._is_loaded and now - self._launched_s > _START_S:
            self._close_launcher()
            self._fail_waiting(EngineFaultError("the process that compiles grammars did not start"))
        for grammar in list(self._compiling.values()):
            if now - grammar.since_s > self.limits.compile_wall_s:
                self._lose(grammar, "time")
        while (
            self._is_loaded
            and self._waiting
            and now - self._waiting[0].since_s > self.limits.max_wait_s
        ):
            message = "the grammars of other requests take all places; try again later"
            self._settle(self._waiting.popleft(), QueueFullError(message))

    def _end_all(self, error: NanovllmError) -> None:
        for grammar in list(self._workers.values()):
            self._disconnect(grammar)
            if not grammar.is_settled:
                self._settle(grammar, error)
            with self._lock:
                grammar.state, grammar.error = GrammarState.FAILED, grammar.error or error
        self._fail_waiting(error)
        if self._launcher is not None:
            self._launcher.close()


def describe_limit(limit: str, limits: GrammarLimits) -> str:
    """Return what a grammar did that ended its worker, with the limit and the remedy."""
    reasons = {
        "memory": f"the grammar needs more than {limits.memory_bytes >> 20} MiB of memory",
        "stack": "the rules of the grammar are nested too deeply",
        "time": (
            f"the grammar takes more than {limits.compile_cpu_s:g} s to compile "
            f"or {limits.mask_cpu_s:g} s for one token"
        ),
        "total": "the grammar takes too long over all tokens of the answer",
    }
    return f"{reasons[limit]}; make it simpler or smaller"


def _unknown_tokenizer(message: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs cannot be used with this tokenizer: {_first_lines(message)}",
        param=PARAM,
    )


def not_usable(reason: str) -> InvalidRequestError:
    """Return the error of a grammar that cannot be used for this reason."""
    return InvalidRequestError(
        f"structured_outputs cannot be used: {_first_lines(reason)}", param=PARAM
    )


def _first_lines(text: str, limit: int = 300) -> str:
    """Return the beginning of the library's explanation, on one line."""
    shown = " ".join(text.split())
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
