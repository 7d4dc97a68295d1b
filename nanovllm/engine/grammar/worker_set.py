"""The workers of a pool: which one compiles a grammar, their start and their end.

New grammars, and those that have shown to be slow, use all slots but the last. So there is a worker
for quick grammars, whatever the others do.
"""

import selectors
import time
from collections.abc import Callable

from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.states import GrammarState, PooledGrammar
from nanovllm.engine.grammar.worker import PROMPT_S, GrammarWorker
from nanovllm.engine.sandbox.process import WorkerProcess

_IDLE_S = 10.0  # time after which a worker that nobody needs ends, unless it is the only one


class WorkerSet:
    """Slots for a fixed number of workers."""

    def __init__(self, start: Callable[[], WorkerProcess], limits: GrammarLimits) -> None:
        """Start nothing yet. `start` starts a process and sends it the tokenizer."""
        self._start = start
        self._limits = limits
        self._slots: list[GrammarWorker | None] = [None] * limits.num_workers
        self._ended: list[WorkerProcess] = []  # killed, not reaped yet

    @property
    def running(self) -> list[GrammarWorker]:
        """The workers that run."""
        return [worker for worker in self._slots if worker is not None]

    @property
    def num_compiling(self) -> int:
        """Number of grammars that are being compiled."""
        return sum(worker.compiling is not None for worker in self.running)

    @property
    def has_room(self) -> bool:
        """Whether one more grammar may be compiled."""
        held = [grammar for worker in self.running for grammar in worker.grammars.values()]
        ready_bytes = sum(one.num_bytes for one in held if one.state is GrammarState.READY)
        compiling_bytes = self._limits.memory_bytes * (self.num_compiling + 1)
        return self._limits.allow(len(held) + 1, ready_bytes + compiling_bytes)

    def is_spare(self, worker: GrammarWorker, now_s: float) -> bool:
        """Return whether nobody needs a worker, and it is slow or one of several."""
        is_used = any(grammar.sequences for grammar in worker.grammars.values())
        is_old = now_s - worker.since_s > _IDLE_S and len(self.running) > 1
        return worker.is_idle and not is_used and (worker.is_slow or is_old)

    def prompt_s(self, grace_s: float) -> float:
        """Return how long a step waits for the masks of prompt workers."""
        since_s = max((each.since_s for each in self.running if each.is_prompt), default=0.0)
        return since_s + min(grace_s, PROMPT_S) - time.monotonic()

    def worker_of(self, grammar: PooledGrammar) -> GrammarWorker | None:
        """Return the worker that has compiled a grammar, or compiles it."""
        return next((each for each in self.running if grammar.number in each.grammars), None)

    def find_idle(self, grammar: PooledGrammar) -> GrammarWorker | None:
        """Return the idle worker with fewest grammars; None if there is none.

        Where all that may compile the grammar are late, this starts another. Raises OSError.
        """
        usable = self._usable(grammar)
        idle = [each for each in usable if each and each.is_idle]
        if not idle and None in usable and all(each is None or each.is_late for each in usable):
            self._slots[self._slots.index(None)] = GrammarWorker(self._start(), self._limits)
        return min(idle, key=lambda each: len(each.grammars), default=None)

    def _usable(self, grammar: PooledGrammar) -> list[GrammarWorker | None]:
        """Return the workers that may compile a grammar; None for each that is not running."""
        slots = self._slots if grammar.is_quick else self._slots[: self._limits.max_compiling]
        prompt = [each for each in slots if each is None or not each.is_slow or grammar.is_slow]
        return prompt or slots

    def wait(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` until a worker has sent something, or takes more bytes."""
        running = self.running
        if not running:
            time.sleep(timeout_s)
            return
        with selectors.DefaultSelector() as selector:
            for worker in running:
                writes = selectors.EVENT_WRITE if worker.process.has_unsent else 0
                selector.register(worker.process, selectors.EVENT_READ | writes)
            selector.select(timeout_s)

    def end(self, worker: GrammarWorker) -> None:
        """Kill a worker, without waiting for its end."""
        self._slots[self._slots.index(worker)] = None
        worker.process.end(waits=False)
        self._ended.append(worker.process)

    def reap(self) -> None:
        """Forget the killed processes that have ended."""
        self._ended = [process for process in self._ended if process.is_running]

    def close(self) -> None:
        """Kill all workers and wait for their end."""
        for worker in self.running:
            self.end(worker)
        for process in self._ended:
            process.end()
        self._ended = []
