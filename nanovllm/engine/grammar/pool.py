"""Compile grammars in a few worker processes, and request the masks of the sequences that use them.

Each worker holds many grammars, and each grammar is in one worker, or in none. Work that takes long
must not delay others:

    a new grammar           is compiled by any worker but the last
    a worker is late        the other grammars in it that need masks move to an idle worker; one is
                            started where all are late
    a worker ends           because of a limit: the grammar at fault fails, or its sequence does,
                            and the second such sequence fails its grammar; for another cause: what
                            it was working on fails when it ends a second worker; a path, which is
                            for drafts, only ends the paths of its grammar
    there is no room        idle grammars are evicted, then those in use of the client with most;
                            see shares.py

A grammar that moves, was evicted or has lost its worker is compiled again where a sequence needs a
mask, and the sequence's tokens are sent again. The mask of a position is requested as soon as the
token before it is known; until it arrives, the sequence takes no part in the engine's steps.

There is no thread: whoever waits calls `poll`, also an idle engine while a worker still compiles.
"""

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from nanovllm.engine.grammar.limits import (
    GrammarLimits,
    limit_error,
    not_usable,
    stopped_error,
    unknown_tokenizer,
)
from nanovllm.engine.grammar.states import MAX_ENDS, GrammarState, MaskSequence, PooledGrammar
from nanovllm.engine.grammar.table import CompileQueue, GrammarTable
from nanovllm.engine.grammar.worker import GrammarWorker
from nanovllm.engine.grammar.worker_set import WorkerSet
from nanovllm.engine.sandbox.messages import Message
from nanovllm.engine.sandbox.process import WorkerEndedError, WorkerProcess
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError, QueueFullError

logger = logging.getLogger(__name__)

_MAX_STARTS = 3  # workers that may end before they have loaded, until waiting grammars fail


class GrammarPool:
    """The grammars of one tokenizer and their workers. One thread uses it, that of the engine."""

    def __init__(self, start: Callable[[], WorkerProcess], limits: GrammarLimits) -> None:
        """Create the pool; the first grammar starts a worker.

        `start` starts a process and sends it the tokenizer; it raises OSError.
        """
        self.limits = limits
        self._table = GrammarTable()
        self._workers = WorkerSet(start, limits)
        self._queue = CompileQueue()
        self._numbers = itertools.count(1)
        self._num_starts = 0
        self._is_closed = False

    @property
    def num_unsettled(self) -> int:
        """Number of grammars that wait or compile for the first time."""
        return len(self._table.unsettled)

    @property
    def num_compiling(self) -> int:
        """Number of grammars that are being compiled."""
        return self._workers.num_compiling

    def add(self, sequence: MaskSequence, key: str, source: dict[str, Any]) -> None:
        """Give a sequence the grammar of this key, and begin to compile it if it is new.

        The sequence may get an error. The caller calls `release` once.
        """
        grammar = self._table.get(key)
        if grammar is None:
            error = stopped_error() if self._is_closed else self._make_place(sequence.client)
            sequence.error = error
            if error is not None:
                return
            grammar = PooledGrammar(next(self._numbers), key, source, sequence.client)
            self._table.add(grammar)
            self._queue.put(grammar)
        grammar.add(sequence)

    def request(self, sequence: MaskSequence) -> None:
        """Queue a request for the mask after the sequence's tokens; `flush` sends it."""
        grammar = sequence.pooled
        if grammar is None or sequence.number not in grammar.sequences:
            return  # it was refused
        worker = self._workers.worker_of(grammar)
        if worker is not None and grammar.state is GrammarState.READY:
            worker.queue(sequence)
        else:
            self._find_worker(grammar)

    def release(self, sequence: MaskSequence) -> None:
        """Request no more masks. A worker that is late for this sequence alone is ended."""
        grammar = sequence.pooled
        if grammar is None or grammar.sequences.pop(sequence.number, None) is None:
            return
        worker = self._workers.worker_of(grammar)
        if worker is not None and worker.compiling is grammar:
            if not grammar.sequences and worker.is_late:
                self._end(worker)
        elif worker is not None:
            if worker.current[0] is sequence and worker.is_late:
                self._end(worker)
            else:
                worker.release([sequence.number])
        if not grammar.sequences and grammar.state is GrammarState.WAITING:
            self._cancel(grammar)

    def flush(self) -> None:
        """Send the queued requests."""
        for worker in self._workers.running:
            worker.send_requests()

    def poll(self) -> None:
        """Receive what has arrived and send what is queued, without waiting."""
        now_s = time.monotonic()
        for worker in self._workers.running:
            self._receive(worker)
        for worker in self._workers.running:
            self._check(worker, now_s)
        self._compile_waiting()
        self._check_queues(now_s)
        self._workers.reap()
        self.flush()

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` until a worker has sent something."""
        self._workers.wait(timeout_s)

    def wait_for_prompt(self, grace_s: float) -> None:
        """Wait for the masks of prompt workers, at most `grace_s` after their request, and poll.

        Most masks arrive before the next step starts or shortly after. Without this wait their
        sequences would miss every second step. Workers with late replies are not waited for.
        """
        while (left_s := self._workers.prompt_s(grace_s)) > 0.0:
            self.wait(left_s)
            self.poll()

    def close(self) -> None:
        """End all workers, and fail what needs them. Idempotent."""
        self._is_closed = True
        self._workers.close()
        for grammar in self._table:
            if grammar.error is None:
                self._fail(grammar, stopped_error())

    def abandon(self) -> None:
        """Close the inherited descriptors in a forked process; the parent keeps the workers."""
        for worker in self._workers.running:
            worker.process.close()

    def check_integrity(self) -> None:
        """Assert that all state is consistent; for tests."""
        held = [one for worker in self._workers.running for one in worker.grammars.values()]
        states = (GrammarState.COMPILING, GrammarState.READY)
        assert {one for one in self._table if one.state in states} == set(held)
        assert len(held) == len(set(held)) <= self.limits.max_grammars
        waiting = list(self._queue)
        assert len(waiting) == len(set(waiting))
        assert all(grammar.state is GrammarState.WAITING for grammar in waiting)
        for grammar in self._table:
            is_waiting = grammar.state is GrammarState.WAITING
            assert is_waiting == (grammar in waiting)
            assert not (grammar.state is GrammarState.EVICTED and grammar.needs_worker)

    def _make_place(self, client: str) -> QueueFullError | None:
        """Have waiting grammars make way where there are too many; return an error if none does.

        A grammar that makes way is cancelled for the sequences of one client only.
        """
        limit = self.limits.max_waiting + self.limits.max_compiling
        while len(self._table.unsettled) >= limit:
            displaced = self._table.displaced(client)
            if displaced is None:
                return QueueFullError(
                    f"{limit} grammars of other requests wait to be compiled, the limit; try again "
                    "later"
                )
            largest, grammar = displaced
            for sequence in list(grammar.sequences.values()):
                if sequence.client == largest:
                    sequence.error = QueueFullError(
                        "grammars of other clients take its place; try again later"
                    )
                    self.release(sequence)
        return None

    def _find_worker(self, grammar: PooledGrammar) -> None:
        """Request the missing masks of a grammar from its worker, or have it compiled again."""
        worker = self._workers.worker_of(grammar)
        if grammar.state is GrammarState.READY and worker is not None:
            for sequence in filter(lambda each: each.needs_mask, grammar.sequences.values()):
                worker.queue(sequence)
        elif grammar.state is GrammarState.EVICTED and grammar.needs_worker:
            grammar.move_to(GrammarState.WAITING)
            self._queue.put(grammar)

    def _cancel(self, grammar: PooledGrammar) -> None:
        """Remove a waiting grammar that nobody needs; keep its first mask if there is one."""
        self._queue.remove(grammar)
        if grammar.first_mask is None:
            self._table.remove(grammar)
        else:
            grammar.move_to(GrammarState.EVICTED)

    def _fail(self, grammar: PooledGrammar, error: NanovllmError) -> None:
        """Store an error, and keep the grammar only if a retry would give the same error."""
        self._queue.remove(grammar)
        grammar.set_error(error)
        if not isinstance(error, InvalidRequestError):
            self._table.remove(grammar)

    def _fail_waiting(self, error: NanovllmError) -> None:
        for grammar in self._queue:
            self._fail(grammar, error)

    def _evict(self, worker: GrammarWorker, grammar: PooledGrammar) -> None:
        """Remove a compiled grammar from its worker; compile it again where a sequence needs it."""
        grammar.move_to(GrammarState.EVICTED)
        worker.release(list(grammar.sequences), [grammar.number])
        self._reset(grammar)

    def _reset(self, grammar: PooledGrammar) -> None:
        """Have all tokens of a grammar's sequences sent to its next worker."""
        for sequence in grammar.sequences.values():
            sequence.num_sent = 0
        self._find_worker(grammar)

    def _receive(self, worker: GrammarWorker) -> None:
        """Handle the messages of a worker, which may be broken."""
        try:
            for message in worker.process.receive():
                self._handle(worker, message)
        except WorkerEndedError as error:
            self._lose(worker, error.limit)
        except (KeyError, TypeError, ValueError):
            logger.exception("a worker of grammars sent a message that is not valid")
            self._lose(worker, None)

    def _handle(self, worker: GrammarWorker, message: Message) -> None:
        header, body = message
        if header["op"] == "masks":
            worker.store_masks(header, body)
        elif header["op"] == "loaded":
            worker.is_loaded = True
        elif header["op"] == "failed":
            self._end(worker)
            self._fail_waiting(unknown_tokenizer(str(header["message"])))
        else:
            self._settle(worker, header, body)

    def _settle(self, worker: GrammarWorker, header: dict[str, Any], body: bytes) -> None:
        """Store the result of a compilation."""
        grammar = worker.finish_compiling()
        if grammar is None:
            raise ValueError("the worker was compiling nothing")
        self._num_starts = 0
        if header["op"] == "compiled":
            grammar.num_bytes, grammar.cpu_s = int(header["num_bytes"]), float(header["cpu_s"])
            grammar.set_first_mask(body)
            grammar.move_to(GrammarState.READY)
            self._find_worker(grammar)
        else:
            del worker.grammars[grammar.number]
            self._fail(grammar, not_usable(str(header["message"])))

    def _check(self, worker: GrammarWorker, now_s: float) -> None:
        """End a worker that is overdue or not needed; move grammars from one that takes long."""
        worker.note_lateness()
        if worker.overdue(now_s):
            self._lose(worker, "time")
        elif self._workers.is_spare(worker, now_s):
            self._end(worker)
        elif worker.is_late:
            sequence, grammar = worker.current
            if grammar is None:
                return  # it reads its requests
            if sequence is None and not (worker.compiling and grammar.sequences):
                self._end(worker)  # the sequence was released, or all those of the new grammar
                return
            grammar.is_slow = True
            if sequence is not None:
                worker.slow_down()
            self._move_others(worker)
        elif worker.is_slow:
            self._move_others(worker)

    def _move_others(self, worker: GrammarWorker) -> None:
        """Move grammars that are not slow to other workers, as far as there are any."""
        for grammar in list(worker.grammars.values()):
            if grammar.is_slow or not (worker.is_slow or grammar.needs_worker):
                continue
            idle = self._idle_worker(grammar)
            if idle is None or idle is worker:
                return
            self._evict(worker, grammar)
            self._compile_waiting()

    def _idle_worker(self, grammar: PooledGrammar) -> GrammarWorker | None:
        """Return an idle worker for a grammar; None if there is none."""
        try:
            return self._workers.find_idle(grammar)
        except OSError as error:
            message = f"the process that compiles grammars cannot be started: {error}"
            self._fail_waiting(EngineFaultError(message))
            return None

    def _compile_waiting(self) -> None:
        """Compile waiting grammars in idle workers, as far as the limits allow."""
        for queue in self._queue.parts:
            while queue:
                grammar = next(iter(queue))
                worker = self._idle_worker(grammar)
                if worker is None or not self._make_room(grammar):
                    break
                queue.take()
                grammar.move_to(GrammarState.COMPILING)
                worker.compile(grammar)

    def _make_room(self, newcomer: PooledGrammar) -> bool:
        """Evict grammars until one more fits. Return whether it does.

        The sequences of one in use wait until it is compiled again.
        """
        while not self._workers.has_room:
            victim = self._table.evictable(newcomer.client)
            worker = None if victim is None else self._workers.worker_of(victim)
            if victim is None or worker is None:
                return False
            self._evict(worker, victim)
        return True

    def _check_queues(self, now_s: float) -> None:
        """Fail grammars that have waited for too long while there were workers."""
        if not any(worker.is_loaded for worker in self._workers.running):
            return
        for grammar in self._queue:
            if now_s - grammar.since_s > self.limits.max_wait_s:
                message = "the grammars of other requests occupy all workers; try again later"
                self._fail(grammar, QueueFullError(message))

    def _lose(self, worker: GrammarWorker, limit: str | None) -> None:
        """Blame a grammar or a sequence for the end of a worker, and forget the worker."""
        sequence, grammar = worker.current
        was_compiling, was_on_path = worker.compiling is not None, worker.is_on_path
        if not worker.is_loaded:
            self._num_starts += 1
        self._end(worker)
        if self._num_starts >= _MAX_STARTS:
            self._num_starts = 0
            self._fail_waiting(EngineFaultError("the process that compiles grammars has ended"))
        elif grammar is not None and was_compiling:
            self._blame_grammar(grammar, limit)
        elif grammar is not None and was_on_path:
            grammar.has_paths = False
        elif sequence is not None:
            self._blame_sequence(sequence, limit)

    def _blame_grammar(self, grammar: PooledGrammar, limit: str | None) -> None:
        """Fail a grammar that has reached a limit, or has ended two workers."""
        grammar.num_ends += 1
        if limit is not None:
            self._fail(grammar, limit_error(limit, self.limits))
        elif grammar.num_ends >= MAX_ENDS:
            message = f"{grammar.num_ends} processes that compiled the grammar have ended"
            self._fail(grammar, EngineFaultError(message))

    def _blame_sequence(self, sequence: MaskSequence, limit: str | None) -> None:
        """Fail a sequence that has ended a worker; the second one fails the grammar."""
        sequence.blame(limit, self.limits)
        grammar = sequence.pooled
        if grammar is not None and isinstance(sequence.error, InvalidRequestError):
            grammar.num_ends += 1
            if grammar.num_ends >= MAX_ENDS:
                self._fail(grammar, sequence.error)

    def _end(self, worker: GrammarWorker) -> None:
        """Kill a worker. What it held is compiled again where a sequence needs it."""
        self._workers.end(worker)
        for grammar in worker.grammars.values():
            if grammar is not worker.compiling:
                grammar.move_to(GrammarState.EVICTED)
                self._reset(grammar)
                continue
            grammar.move_to(GrammarState.WAITING)
            if grammar.sequences:
                self._queue.put(grammar)
            else:
                self._cancel(grammar)
