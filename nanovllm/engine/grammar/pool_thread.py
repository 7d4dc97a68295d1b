"""The thread of a grammar pool: it starts, monitors and ends worker processes.

Other threads post commands and call `start`, `end`, `join` and `abandon`. All other methods run on
the thread.
"""

import contextlib
import logging
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from nanovllm.engine.grammar.command_queue import CommandQueue
from nanovllm.engine.grammar.limits import (
    GrammarLimits,
    describe_limit,
    not_usable,
    unknown_tokenizer,
)
from nanovllm.engine.grammar.table import (
    Connection,
    GrammarState,
    GrammarTable,
    PooledGrammar,
    stopped_error,
)
from nanovllm.engine.sandbox.launcher import START_S, Launcher, Tokens, make_launcher
from nanovllm.engine.sandbox.limits import reached_limit
from nanovllm.engine.sandbox.messages import MessageError, MessageReader, pack
from nanovllm.engine.shares import FairQueue, Shares
from nanovllm.errors import EngineFaultError, NanovllmError, QueueFullError

logger = logging.getLogger(__name__)

_CHECK_S = 0.25  # interval between timeout checks while grammars wait or compile
END_S = 2.0
"""Longest wait for the thread. The tokens of a large vocabulary may take as long to be sent to a
fork server on a busy machine; the processes end without it, when their sockets close."""
_MAX_ENDS = 3  # ends of the fork server, with no grammar compiled between, until waiting ones fail


class PoolThread:
    """Workers for the grammars of a table."""

    def __init__(
        self,
        tokens: Tokens,
        limits: GrammarLimits,
        table: GrammarTable,
        on_change: Callable[[], None],
    ) -> None:
        """Start nothing yet. `on_change` is called when a grammar has changed its state."""
        self._tokens = tokens
        self._limits = limits
        self._table = table
        self._on_change = on_change
        self.commands = CommandQueue()
        self._thread: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._launcher: Launcher | None = None
        self._is_loaded = False
        self._launched_s = 0.0
        self._num_ends = 0
        self._waiting: FairQueue[PooledGrammar] = FairQueue()
        self._compiling: dict[int, PooledGrammar] = {}
        self._workers: dict[int, PooledGrammar] = {}
        self._num_started = 0

    # From any thread ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread unless it runs or has ended."""
        with self.commands.lock:
            if self._thread is None and not self.commands.has_ended:
                self._thread = threading.Thread(
                    target=self._run, name="nanovllm-grammars", daemon=True
                )
                self._thread.start()

    def end(self) -> None:
        """End the thread, after its table was closed."""
        self.commands.post(lambda: None)
        with self.commands.lock:
            if self._thread is None:
                self.commands.end()
                self._selector.close()

    def join(self) -> None:
        """Wait until the thread has ended, for END_S at most: it may be starting a process."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(END_S)

    def abandon(self) -> None:
        """Close all descriptors without a message to the workers, in a forked process.

        Open copies of their sockets would let the fork server and the workers outlive the parent.
        """
        self.commands.abandon()
        self._selector.close()
        for grammar in self._workers.values():
            if grammar.connection is not None:
                grammar.connection.socket.close()
        if self._launcher is not None and self._launcher.connection is not None:
            self._launcher.connection.close()

    # On the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self.commands.woken, selectors.EVENT_READ, self.commands.run)
        try:
            while not self._table.is_closed:
                timeout_s = _CHECK_S if self._waiting or self._compiling else None
                for key, _ in self._selector.select(timeout_s):
                    key.data()
                self._launch_waiting()
                self._check_times()
        except Exception:
            logger.exception("the thread of the grammar pool failed")
        finally:
            self._table.close()
            with contextlib.suppress(Exception):
                self._end_all(stopped_error())
            self.commands.end()
            self._selector.close()

    # Commands -----------------------------------------------------------------------------------

    def enqueue(self, grammar: PooledGrammar) -> None:
        """Append a grammar to the compile queue, in which clients take turns."""
        grammar.since_s = time.monotonic()
        if self._table.is_closed:
            self._settle(grammar, stopped_error())
        else:
            self._waiting.put(grammar.client, grammar)

    def watch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Call `watcher` once the grammar is settled."""
        if self.commands.has_ended and not grammar.is_settled:
            self._settle(grammar, stopped_error())
        if grammar.is_settled:
            watcher()
        else:
            grammar.watchers.append(watcher)

    def unwatch(self, grammar: PooledGrammar, watcher: Callable[[], None]) -> None:
        """Remove a watcher, and cancel the compilation if it was the last."""
        if watcher not in grammar.watchers:
            return
        grammar.watchers.remove(watcher)
        if not grammar.watchers and not grammar.is_settled:
            self._table.remove(grammar)
            self._cancel(grammar)

    def drop_holder(self, grammar: PooledGrammar) -> None:
        """Remove a holder, and cancel the compilation if nobody needs it."""
        if self._table.drop_holder(grammar):
            self._cancel(grammar)

    def _cancel(
        self, grammar: PooledGrammar, reason: str = "the grammar was cancelled; try again"
    ) -> None:
        """Cancel a grammar that was removed from the table."""
        self._waiting.remove(grammar.client, grammar)
        self._disconnect(grammar)
        self._settle(grammar, QueueFullError(reason))

    def displace(self, grammar: PooledGrammar) -> None:
        """Fail a waiting grammar, removed from the table, that makes way for another client's."""
        if not grammar.is_settled:
            self._cancel(grammar, "grammars of other clients take its place; try again later")

    def end_worker(self, grammar: PooledGrammar, worker: int, limit: str) -> None:
        """End this worker if it is still the grammar's."""
        if self._workers.get(worker) is grammar:
            self._lose(grammar, limit)

    def slow_down(self, worker: int) -> None:
        """Give a worker the lowest priority."""
        if self._launcher is not None:
            self._launcher.slow_down(worker)

    def check_lost(self, grammar: PooledGrammar, worker: int) -> None:
        """Find out why a worker has closed its socket, unless the fork server will report it."""
        if self._workers.get(worker) is not grammar or self._launcher is None:
            return
        self._stop_reading(grammar)
        if self._launcher.connection is None:
            self._lose(grammar, reached_limit(self._launcher.exit_code(worker)) or "")

    # The fork server ----------------------------------------------------------------------------

    def _start_launcher(self) -> None:
        self._is_loaded, self._launched_s = False, time.monotonic()
        try:
            self._launcher = make_launcher(self._tokens)
        except OSError as error:
            message = f"the process that compiles grammars cannot be started: {error}"
            self._fail_waiting(EngineFaultError(message))
            return
        connection = self._launcher.connection
        if connection is None:
            self._is_loaded = True
        else:
            self._selector.register(connection, selectors.EVENT_READ, self._receive_events)

    def _receive_events(self) -> None:
        if self._launcher is None:
            return
        try:
            for event in self._launcher.read():
                if event["op"] == "closed":
                    self._close_launcher()
                    return
                self._handle_event(event)
        except MessageError:
            self._close_launcher()

    def _handle_event(self, event: dict[str, Any]) -> None:
        if event["op"] == "loaded":
            self._is_loaded = True
        elif event["op"] == "failed":
            self._fail_waiting(unknown_tokenizer(event["message"]))
        elif event["op"] == "exited":
            grammar = self._workers.get(event["id"])
            if grammar is not None and event["id"] in self._compiling:
                self._receive(grammar)  # its last message may have the reason
            if grammar is not None and self._workers.get(event["id"]) is grammar:
                self._lose(grammar, reached_limit(event["code"]) or "")

    def _close_launcher(self) -> None:
        """Close a fork server that has ended, and its workers. The next grammar starts another."""
        if self._launcher is not None:
            if self._launcher.connection is not None:
                self._selector.unregister(self._launcher.connection)
            self._launcher.close()
        self._launcher, self._is_loaded = None, False
        for grammar in list(self._workers.values()):
            if grammar.state is GrammarState.COMPILING:
                self._compile_again(grammar)
            else:
                self._lose(grammar, "")
        self._num_ends += 1
        if self._num_ends >= _MAX_ENDS:
            self._num_ends = 0
            self._fail_waiting(EngineFaultError("the process that compiles grammars has ended"))

    # Compiling ----------------------------------------------------------------------------------

    def _launch_waiting(self) -> None:
        """Start workers for waiting grammars, as far as the limits allow."""
        if self._waiting and self._launcher is None:
            self._start_launcher()
        while (
            self._waiting and self._is_loaded and len(self._compiling) < self._limits.max_compiling
        ):
            grammar = self._waiting.take()
            if not self._make_room(grammar.client):
                self._waiting.put_back(grammar.client, grammar)
                return
            self._launch(grammar)

    def _make_room(self, client: str) -> bool:
        """Evict grammars until one more worker of `client` fits. Return whether it does.

        Idle ones go first, then the newest worker in use of the client with most: its sequences
        wait until it is compiled again.
        """
        num_workers = len(self._workers) + 1
        num_bytes = sum(grammar.num_bytes for grammar in self._workers.values())
        num_bytes += self._limits.memory_bytes * (len(self._compiling) + 1)

        def fits(evicted: list[PooledGrammar]) -> bool:
            bytes_left = num_bytes - sum(grammar.num_bytes for grammar in evicted)
            return self._limits.allow(num_workers - len(evicted), bytes_left)

        evicted = self._table.evict(fits)
        for grammar in evicted:
            self._disconnect(grammar)
        while not fits(evicted):
            in_use = [one for one in self._workers.values() if one.worker not in self._compiling]
            shares = Shares(None, (grammar.client for grammar in in_use))
            largest = shares.displaced(client)
            if largest is None:
                return False
            newest = next(one for one in reversed(in_use) if one.client == largest)
            self._lose(newest, "")
            evicted.append(newest)
        return True

    def _launch(self, grammar: PooledGrammar) -> None:
        assert self._launcher is not None
        limits = self._limits
        header = {
            "op": "compile", "grammar": grammar.source, "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.compile_cpu_s, "mask_cpu_s": limits.mask_cpu_s,
        }  # fmt: skip
        self._num_started += 1
        worker = self._num_started
        try:
            connected = self._launcher.start(worker, pack(header))
        except OSError as error:
            if self._launcher.connection is None:
                self._settle(grammar, EngineFaultError(f"a grammar cannot be compiled: {error}"))
            else:
                self._waiting.put_back(grammar.client, grammar)
                self._close_launcher()
            return
        connected.setblocking(False)
        grammar.reader, grammar.since_s = MessageReader(), time.monotonic()
        self._table.set_compiling(grammar, worker, Connection(connected))
        self._workers[worker] = self._compiling[worker] = grammar
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._receive(grammar))

    def _receive(self, grammar: PooledGrammar) -> None:
        """Receive the result of a compilation."""
        if grammar.connection is None:
            return  # an earlier event of the same `select` ended it
        try:
            data = grammar.connection.socket.recv(1 << 16)
            messages = list(grammar.reader.feed(data))
        except BlockingIOError:
            return
        except (OSError, MessageError):
            data, messages = b"", []
        if not data:
            self.check_lost(grammar, grammar.worker)
        for header, body in messages:
            op, message = header.get("op"), str(header.get("message"))
            if op == "loaded":
                continue  # the worker was spawned
            if op == "compiled" and isinstance(header.get("num_bytes"), int):
                self._stop_reading(grammar)
                del self._compiling[grammar.worker]
                self._table.set_ready(grammar, header["num_bytes"], body)
                self._num_ends = 0
                self._settle(grammar, None)
                return
            self._disconnect(grammar)
            if op == "failed":
                self._settle(grammar, unknown_tokenizer(message))
            else:
                self._settle(grammar, not_usable(message))
            return

    def _stop_reading(self, grammar: PooledGrammar) -> None:
        if grammar.connection is not None:
            with contextlib.suppress(KeyError, ValueError):  # it is not registered, or closed
                self._selector.unregister(grammar.connection.socket)

    def _lose(self, grammar: PooledGrammar, limit: str) -> None:
        """End a worker, and fail the grammar that it was compiling."""
        was_compiling = grammar.state is GrammarState.COMPILING
        self._disconnect(grammar)
        self._table.set_lost(grammar, limit)
        if not was_compiling:
            self._on_change()
        elif limit:
            self._settle(grammar, not_usable(describe_limit(limit, self._limits)))
        else:
            self._settle(grammar, EngineFaultError("the process that compiled the grammar ended"))

    def _compile_again(self, grammar: PooledGrammar) -> None:
        """Return a grammar to the front of the queue after the fork server has ended."""
        self._disconnect(grammar)
        self._table.set_waiting(grammar)
        self._waiting.put_back(grammar.client, grammar)

    def _disconnect(self, grammar: PooledGrammar) -> None:
        """End a grammar's worker, if it has one."""
        self._stop_reading(grammar)
        self._compiling.pop(grammar.worker, None)
        if self._workers.pop(grammar.worker, None) is not None and self._launcher is not None:
            self._launcher.kill(grammar.worker)
        connection = self._table.take_connection(grammar)
        if connection is not None:
            connection.cut()

    def _settle(self, grammar: PooledGrammar, error: NanovllmError | None) -> None:
        """Store an error, and call the watchers."""
        if error is not None:
            self._table.set_failed(grammar, error)
        watchers, grammar.watchers = grammar.watchers, []
        for watcher in watchers:
            try:
                watcher()
            except Exception:
                logger.exception("a watcher of a grammar failed")
        self._on_change()

    def _fail_waiting(self, error: NanovllmError) -> None:
        for grammar in self._waiting.clear():
            self._settle(grammar, error)

    def _check_times(self) -> None:
        """End work that has exceeded its timeout."""
        now_s, limits = time.monotonic(), self._limits
        is_loading = self._launcher is not None and not self._is_loaded
        if is_loading and now_s - self._launched_s > START_S:
            self._close_launcher()
            self._fail_waiting(EngineFaultError("the process that compiles grammars did not start"))
        for grammar in list(self._compiling.values()):
            if now_s - grammar.since_s > limits.compile_wall_s:
                self._lose(grammar, "time")
        late = [one for one in self._waiting if now_s - one.since_s > limits.max_wait_s]
        for grammar in late if self._is_loaded else ():
            self._waiting.remove(grammar.client, grammar)
            message = "the grammars of other requests occupy all workers; try again later"
            self._settle(grammar, QueueFullError(message))

    def _end_all(self, error: NanovllmError) -> None:
        for grammar in list(self._workers.values()):
            self._disconnect(grammar)
            if grammar.error is None:
                self._settle(grammar, error)
        self._fail_waiting(error)
        if self._launcher is not None:
            self._launcher.close()
