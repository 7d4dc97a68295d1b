"""Asks the workers of grammars for token masks, and takes them in, on the engine's thread.

A mask is asked for as soon as the token before it is known. Until it comes, its sequence takes no part in the engine's steps, and
nobody else waits. A sequence whose worker has ended goes on with another one, which is sent all of its tokens.
"""

import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field

from nanovllm.engine.grammar_pool import (
    Connection,
    GrammarLimits,
    GrammarPool,
    PooledGrammar,
    describe_limit,
    not_usable,
)
from nanovllm.engine.sandbox.messages import MessageError, MessageReader, pack
from nanovllm.errors import EngineFaultError, NanovllmError

_SLOW_S = 0.02  # a worker that is at work for longer gets a low priority
_PROMPT_S = 0.002  # masks that come within this time are worth waiting for
_MAX_ATTEMPTS = 3  # workers that may end in the middle of one mask without a limit that explains it


@dataclass(slots=True, eq=False)
class MaskSequence:
    """The masks of one sequence.

    Attributes:
        mask: one bit a token, for the next position; None until it has come.
        error: why no more masks come.
        cpu_s, num_masks: what its masks have taken, and how many there were.
    """

    number: int
    grammar: PooledGrammar
    tokens: list[int] = field(default_factory=list)
    mask: bytes | None = None
    error: NanovllmError | None = None
    worker: int = -1
    attempts: int = 0
    cpu_s: float = 0.0
    num_masks: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """What this side knows of a worker that is READY; `waiting` in the order in which the worker works."""

    number: int
    grammar: PooledGrammar
    connection: Connection
    reader: MessageReader = field(default_factory=MessageReader)
    waiting: dict[int, MaskSequence] = field(default_factory=dict)
    busy_since_s: float = 0.0
    late: int = 0
    is_slowed: bool = False
    is_lost: bool = False


class MaskClient:
    """The engine's side of all workers. For one thread, but for `wake`."""

    def __init__(self, limits: GrammarLimits) -> None:
        """Ask for nothing yet."""
        self._limits = limits
        self._workers: dict[int, _Worker] = {}
        self._unattached: dict[int, MaskSequence] = {}
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)

    def __del__(self) -> None:
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def wake(self) -> None:
        """End `wait` of another thread."""
        with suppress(BlockingIOError, OSError):
            self._wake.send(b".")

    @property
    def is_waiting(self) -> bool:
        """Whether any mask has been asked for that has not come."""
        return bool(self._unattached) or any(worker.waiting for worker in self._workers.values())

    def ask(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Ask for the mask behind the sequence's tokens, the last of which is new."""
        sequence.mask = None
        worker = self._workers.get(sequence.worker)
        if worker is None or worker.is_lost:
            self._attach(pool, sequence)
        else:
            self._send(pool, worker, sequence, sequence.tokens[-1:])

    def drop(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Ask for nothing more. A worker that computes for nobody else ends."""
        self._unattached.pop(sequence.number, None)
        worker = self._workers.get(sequence.worker)
        if worker is None or worker.is_lost:
            return
        sequence.worker = -1
        was_waiting = worker.waiting.pop(sequence.number, None) is not None
        if was_waiting and not worker.waiting:
            pool.end_worker(worker.grammar, worker.number)
        else:
            self._write(pool, worker, {"op": "free", "sequence": sequence.number})
            pool.release(worker.grammar, worker.number)

    def poll(self, pool: GrammarPool) -> None:
        """Take in the masks that have come, without waiting."""
        for sequence in list(self._unattached.values()):
            self._attach(pool, sequence)
        now = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.waiting or worker.is_lost:
                self._read(pool, worker, now)
            elif worker.grammar.worker != worker.number or not worker.grammar.users:
                self._remove(worker)

    def wait(self, timeout_s: float) -> None:
        """Wait for a mask or for `wake`, no longer than `timeout_s`."""
        ready = [key.fileobj for key, _ in self._selector.select(timeout_s)]
        if self._woken in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)

    def wait_for_prompt(self, pool: GrammarPool, grace_s: float) -> None:
        """Wait until no mask is missing that should be there at once, no longer than `grace_s` after it was asked for.

        Masks mostly come before the next step begins, or a moment later; without that moment their sequences would miss every
        other step. Workers that were late are not waited for.
        """
        grace_s = min(grace_s, _PROMPT_S)
        while True:
            now = time.monotonic()
            ends = [
                worker.busy_since_s + grace_s
                for worker in self._workers.values()
                if worker.waiting and not worker.late and not worker.is_lost
            ]
            if not ends or max(ends) <= now:
                return
            self.wait(max(ends) - now)
            self.poll(pool)

    def _attach(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Send all of a sequence's tokens to the worker of its grammar, or keep it until there is one."""
        grammar = sequence.grammar
        if grammar.error is not None:
            self._unattached.pop(sequence.number, None)
            sequence.error = grammar.error
            return
        connection = grammar.connection if pool.acquire(grammar) else None
        if connection is None:
            self._unattached[sequence.number] = sequence
            return
        self._unattached.pop(sequence.number, None)
        sequence.worker = grammar.worker
        worker = self._workers.get(grammar.worker)
        if worker is None:
            worker = self._workers[grammar.worker] = _Worker(grammar.worker, grammar, connection)
            self._selector.register(connection.socket, selectors.EVENT_READ)
        self._send(pool, worker, sequence, sequence.tokens)

    def _send(
        self, pool: GrammarPool, worker: _Worker, sequence: MaskSequence, tokens: list[int]
    ) -> None:
        if not worker.waiting:
            worker.busy_since_s = time.monotonic()
        worker.waiting[sequence.number] = sequence
        self._write(pool, worker, {"op": "next", "sequence": sequence.number, "tokens": tokens})

    def _write(self, pool: GrammarPool, worker: _Worker, header: dict[str, object]) -> None:
        try:
            data = pack(header)
            sent = worker.connection.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it has ended, which reading finds out
        if sent < len(data):  # it has not read thousands of messages
            pool.end_worker(worker.grammar, worker.number, "time")

    def _read(self, pool: GrammarPool, worker: _Worker, now: float) -> None:
        try:
            data = b"" if worker.is_lost else worker.connection.socket.recv(1 << 20)
            for header, body in worker.reader.feed(data):
                self._take(pool, worker, header, body, now)
            if not data:
                self._lose(pool, worker)
        except BlockingIOError:
            self._watch_time(pool, worker, now)
        except (OSError, MessageError):
            self._lose(pool, worker)

    def _take(
        self, pool: GrammarPool, worker: _Worker, header: dict[str, object], body: bytes, now: float
    ) -> None:
        """Take in an answer of a worker."""
        took_s, worker.busy_since_s = now - worker.busy_since_s, now
        worker.late = max(0, worker.late - 1) if took_s < _PROMPT_S else 16
        sequence = worker.waiting.pop(int(str(header["sequence"])), None)
        if sequence is None:
            return  # dropped meanwhile
        if header["op"] == "error":
            sequence.error = not_usable(str(header["message"]))
            return
        sequence.mask, sequence.attempts = body, 0
        sequence.cpu_s += float(str(header["cpu_s"]))
        sequence.num_masks += 1
        limits = self._limits
        if (
            sequence.cpu_s
            > limits.request_cpu_s + limits.request_cpu_s_per_mask * sequence.num_masks
        ):
            sequence.error = not_usable(describe_limit("total", limits))

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.number]
        if not worker.is_lost:
            self._selector.unregister(worker.connection.socket)

    def _watch_time(self, pool: GrammarPool, worker: _Worker, now: float) -> None:
        """A worker has not answered yet."""
        took_s = now - worker.busy_since_s
        if took_s > _PROMPT_S:
            worker.late = 16
        if took_s > _SLOW_S and not worker.is_slowed:
            worker.is_slowed = True
            pool.slow_down(worker.number)
        if took_s > self._limits.mask_wall_s:
            pool.end_worker(worker.grammar, worker.number, "time")

    def _lose(self, pool: GrammarPool, worker: _Worker) -> None:
        """A worker has ended: the sequence that it worked on is to blame, the others go on with another one."""
        if not worker.is_lost:
            worker.is_lost = True
            self._selector.unregister(worker.connection.socket)
            pool.report_lost(worker.grammar, worker.number)
        lost_by = worker.grammar.lost_by
        is_known = worker.grammar.worker != worker.number or lost_by is not None
        if not is_known and worker.grammar.error is None:
            return  # why is found out on the pool's thread
        self._remove(worker)
        for place, sequence in enumerate(worker.waiting.values()):
            sequence.worker = -1
            if place == 0:
                sequence.attempts += 1
                if lost_by and worker.grammar.worker == worker.number:
                    sequence.error = not_usable(describe_limit(lost_by, self._limits))
                    continue
                if sequence.attempts >= _MAX_ATTEMPTS:
                    sequence.error = EngineFaultError("the process that computed masks has ended")
                    continue
            self._attach(pool, sequence)
