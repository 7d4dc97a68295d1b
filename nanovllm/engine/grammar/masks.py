"""The engine's side of grammar workers: requests token masks and receives them.

The mask of a position is requested as soon as the token before it is known. Until it arrives, its
sequence takes no part in the engine's steps, and no other sequence waits for it. All sequences of a
grammar are requested by one message per step, which one reply answers.

A worker that ends is replaced: its sequences send all of their tokens to the next worker. Where the
worker was computing for several sequences, each is then sent alone, until its mask arrives, so that
the sequence that ends workers fails and the others do not.
"""

import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.grammar.limits import GrammarLimits, describe_limit, not_usable
from nanovllm.engine.grammar.pool import GrammarPool
from nanovllm.engine.grammar.table import Connection, PooledGrammar
from nanovllm.engine.sandbox.messages import MessageError, MessageReader, pack
from nanovllm.errors import EngineFaultError, NanovllmError

_SLOW_S = 0.02  # a worker that computes for longer gets a low priority
_PROMPT_S = 0.002  # maximum time that a step waits for masks
_LATE_REPLIES = 16  # a worker is not waited for until it has sent so many replies in time
_MAX_ATTEMPTS = 3  # workers that may end during one mask without a limit that explains it


@dataclass(slots=True, eq=False)
class MaskSequence:
    """The masks of one sequence.

    Attributes:
        tokens: the tokens that it has accepted.
        mask: one bit per token for the next position; None until it arrives.
        error: why no more masks arrive.
        worker: number of the worker that has its tokens; -1 for none.
        num_sent: how many of its tokens that worker was sent.
        is_suspect: whether a worker ended while it computed this mask and others.
        attempts: workers that ended during this mask without a known limit.
        cpu_s, num_masks: processor time of all its masks, and their number.
    """

    number: int
    grammar: PooledGrammar
    tokens: list[int] = field(default_factory=list)
    mask: bytes | None = None
    error: NanovllmError | None = None
    worker: int = -1
    num_sent: int = 0
    is_suspect: bool = False
    attempts: int = 0
    cpu_s: float = 0.0
    num_masks: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker that is READY.

    Attributes:
        queued: sequences whose mask is to be requested, by number.
        waiting: sequences whose mask has been requested, by number.
        unsent: bytes that the socket has not taken yet.
        busy_since_s: time of the latest reply, or of the request if there was none before it.
        late: replies that must arrive in time before a step waits for the worker again.
        num_replies: replies so far.
    """

    number: int
    grammar: PooledGrammar
    connection: Connection
    reader: MessageReader = field(default_factory=MessageReader)
    queued: dict[int, MaskSequence] = field(default_factory=dict)
    waiting: dict[int, MaskSequence] = field(default_factory=dict)
    unsent: bytearray = field(default_factory=bytearray)
    busy_since_s: float = 0.0
    late: int = 0
    num_replies: int = 0
    is_slowed: bool = False
    is_lost: bool = False

    def next_batch(self) -> list[MaskSequence]:
        """Remove the next sequences to request from `queued`: all, or one suspect alone."""
        if any(sequence.is_suspect for sequence in self.waiting.values()):
            return []
        suspects = [sequence for sequence in self.queued.values() if sequence.is_suspect]
        batch = suspects[:1] or list(self.queued.values())
        if suspects and self.waiting:
            return []
        for sequence in batch:
            del self.queued[sequence.number]
        return batch


class MaskClient:
    """The connections to all workers. One thread uses it, except for `wake`."""

    def __init__(self, limits: GrammarLimits) -> None:
        """Create a client without workers."""
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
        """End `wait` on another thread."""
        with suppress(BlockingIOError, OSError):
            self._wake.send(b".")

    def request(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Queue a request for the mask after the sequence's tokens; `flush` sends it."""
        sequence.mask = None
        worker = self._workers.get(sequence.worker)
        if worker is None or worker.is_lost:
            self._attach(pool, sequence)
        else:
            worker.queued[sequence.number] = sequence

    def drop(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Request no more masks. A worker that is busy for this sequence alone is ended."""
        self._unattached.pop(sequence.number, None)
        worker = self._workers.get(sequence.worker)
        if worker is None or worker.is_lost:
            return
        sequence.worker = -1
        worker.queued.pop(sequence.number, None)
        was_waiting = worker.waiting.pop(sequence.number, None) is not None
        is_prompt = (
            worker.num_replies > 0
            and not worker.late
            and time.monotonic() - worker.busy_since_s < _SLOW_S
        )
        if was_waiting and not worker.waiting and not is_prompt:
            pool.end_worker(worker.grammar, worker.number)
        else:
            self._write(worker, {"op": "free", "sequences": [sequence.number]})
            pool.release(worker.grammar, worker.number)

    def flush(self) -> None:
        """Send the queued requests, one message per worker."""
        for worker in self._workers.values():
            if not worker.is_lost and (worker.queued or worker.unsent):
                self._send_requests(worker)

    def poll(self, pool: GrammarPool) -> None:
        """Receive the masks that have arrived, and send queued requests, without waiting."""
        for sequence in list(self._unattached.values()):
            self._attach(pool, sequence)
        now_s = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.waiting or worker.is_lost:
                self._read(pool, worker, now_s)
            elif worker.grammar.connection is not worker.connection:
                if worker.queued:
                    self._lose(pool, worker)
                else:
                    self._remove(worker)
        self.flush()

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for a mask or for `wake`."""
        ready = [key.fileobj for key, _ in self._selector.select(timeout_s)]
        if self._woken in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)

    def wait_for_prompt(self, pool: GrammarPool, grace_s: float) -> None:
        """Wait for the masks of prompt workers, at most `grace_s` after their request.

        Most masks arrive before the next step starts or shortly after. Without this wait their
        sequences would miss every second step. Workers with late replies are not waited for.
        """
        grace_s = min(grace_s, _PROMPT_S)
        while True:
            now_s = time.monotonic()
            ends_s = [
                worker.busy_since_s + grace_s
                for worker in self._workers.values()
                if worker.waiting and not worker.late and not worker.is_lost
            ]
            if not ends_s or max(ends_s) <= now_s:
                return
            self.wait(max(ends_s) - now_s)
            self.poll(pool)

    def _attach(self, pool: GrammarPool, sequence: MaskSequence) -> None:
        """Queue all of a sequence's tokens for its grammar's worker, or wait until there is one."""
        grammar = sequence.grammar
        self._unattached.pop(sequence.number, None)
        lease = None if grammar.error is not None else pool.acquire(grammar)
        if lease is None:
            sequence.error = grammar.error
            if sequence.error is None:
                self._unattached[sequence.number] = sequence
            return
        worker = self._workers.get(lease.worker)
        if worker is None:
            worker = _Worker(lease.worker, grammar, lease.connection)
            self._workers[lease.worker] = worker
            self._selector.register(lease.connection.socket, selectors.EVENT_READ)
        sequence.worker, sequence.num_sent = lease.worker, 0
        worker.queued[sequence.number] = sequence

    def _send_requests(self, worker: _Worker) -> None:
        """Send the next batch of queued sequences."""
        batch = worker.next_batch()
        if not batch:
            self._write(worker, None)
            return
        if not worker.waiting:
            worker.busy_since_s = time.monotonic()
        tokens = []
        for sequence in batch:
            worker.waiting[sequence.number] = sequence
            tokens.append(sequence.tokens[sequence.num_sent :])
            sequence.num_sent = len(sequence.tokens)
        numbers = [sequence.number for sequence in batch]
        self._write(worker, {"op": "next", "sequences": numbers, "tokens": tokens})

    def _write(self, worker: _Worker, header: dict[str, Any] | None) -> None:
        """Append a message to `unsent`, and send as much as the socket accepts."""
        if header is not None:
            worker.unsent += pack(header)
        with suppress(OSError):  # the socket is full; or has closed, which `_read` handles
            while worker.unsent:
                del worker.unsent[: worker.connection.socket.send(worker.unsent)]

    def _read(self, pool: GrammarPool, worker: _Worker, now_s: float) -> None:
        try:
            data = b"" if worker.is_lost else worker.connection.socket.recv(1 << 20)
            for header, body in worker.reader.feed(data):
                self._receive(worker, header, body, now_s)
            if not data:
                self._lose(pool, worker)
        except BlockingIOError:
            self._check_time(pool, worker, now_s)
        except (OSError, MessageError, KeyError, TypeError, ValueError):  # the worker is broken
            self._lose(pool, worker)

    def _receive(self, worker: _Worker, header: dict[str, Any], body: bytes, now_s: float) -> None:
        """Store the masks and errors of a reply."""
        took_s, worker.busy_since_s = now_s - worker.busy_since_s, now_s
        worker.late = max(0, worker.late - 1) if took_s < _PROMPT_S else _LATE_REPLIES
        worker.num_replies += 1
        errors, end = header["errors"], 0
        items = zip(header["sequences"], header["cpu_s"], header["sizes"], strict=True)
        for index, (number, cpu_s, size) in enumerate(items):
            mask, end = body[end : end + size], end + size
            sequence = worker.waiting.pop(number, None)
            if sequence is None:
                continue  # dropped since
            if str(index) in errors:
                sequence.error = not_usable(str(errors[str(index)]))
            else:
                self._store(sequence, mask, cpu_s)

    def _store(self, sequence: MaskSequence, mask: bytes, cpu_s: float) -> None:
        """Store a mask, and fail the sequence where its masks exceed their processor time."""
        sequence.mask, sequence.attempts, sequence.is_suspect = mask, 0, False
        sequence.cpu_s += cpu_s
        sequence.num_masks += 1
        limits = self._limits
        limit_s = limits.request_cpu_s + limits.request_cpu_s_per_mask * sequence.num_masks
        if sequence.cpu_s > limit_s:
            sequence.error = not_usable(describe_limit("total", limits))

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.number]
        if not worker.is_lost:
            self._selector.unregister(worker.connection.socket)

    def _check_time(self, pool: GrammarPool, worker: _Worker, now_s: float) -> None:
        """Slow down or end a worker that has not replied for too long."""
        took_s = now_s - worker.busy_since_s
        if took_s > _PROMPT_S:
            worker.late = _LATE_REPLIES
        if took_s > _SLOW_S and not worker.is_slowed:
            worker.is_slowed = True
            pool.slow_down(worker.number)
        if took_s > self._limits.mask_wall_s:
            pool.end_worker(worker.grammar, worker.number, "time")

    def _lose(self, pool: GrammarPool, worker: _Worker) -> None:
        """Move the sequences of an ended worker to the next one, and fail the one at fault."""
        if not worker.is_lost:
            worker.is_lost = True
            self._selector.unregister(worker.connection.socket)
            pool.report_lost(worker.grammar, worker.number)
        lost_by = worker.grammar.lost_by
        is_known = worker.grammar.worker != worker.number or lost_by is not None
        if not is_known and worker.grammar.error is None:
            return  # the pool's thread does not know the cause yet
        self._remove(worker)
        if worker.grammar.worker != worker.number:
            lost_by = ""
        requested = list(worker.waiting.values())
        for sequence in requested:
            sequence.is_suspect = True
            sequence.attempts += 1
            if lost_by and len(requested) == 1:
                sequence.error = not_usable(describe_limit(lost_by, self._limits))
            elif sequence.attempts >= _MAX_ATTEMPTS:
                sequence.error = EngineFaultError("the process that computed masks has ended")
        for sequence in (*requested, *worker.queued.values()):
            sequence.worker = -1
            if sequence.error is None:
                self._attach(pool, sequence)
