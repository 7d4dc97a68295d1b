"""One worker process, as the pool sees it: what it holds, and what it is doing.

A worker does one kind of work at a time: it compiles a grammar, or computes masks. All masks of a
step are requested by one message, which one reply answers.
"""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from nanovllm.engine.grammar.limits import GrammarLimits, limit_error, not_usable
from nanovllm.engine.grammar.states import MaskSequence, PooledGrammar
from nanovllm.engine.sandbox.grammar_path import PathRequest
from nanovllm.engine.sandbox.messages import PATH_NOTE
from nanovllm.engine.sandbox.process import START_S, WorkerProcess

LATE_S, LATE_S_PER_TOKEN = 0.02, 20e-6
"""Processor time after which other grammars need not wait any longer. A worker that has replaced
another is sent all tokens again."""
PROMPT_S = 0.002  # maximum time that a step waits for masks
_NO_PATH: tuple[list[int], int, bool] = ([], 0, False)
_LATE_REPLIES = 16  # a worker is not waited for until it has sent so many replies in time


class GrammarWorker:
    """A worker and its grammars.

    Attributes:
        process: the process.
        grammars: those that it has compiled or compiles, by number.
        compiling: the grammar that it compiles.
        queued: sequences whose mask is to be requested, by number.
        requested: those whose mask has been requested, with their grammar; without the sequence
            where it was released since.
        is_loaded: whether it has loaded the library and the tokenizer.
        is_slow: whether it has a low priority, because masks took long.
        since_s: time at which it started, became idle or busy, or sent its latest reply.
    """

    def __init__(self, process: WorkerProcess, limits: GrammarLimits) -> None:
        """Take ownership of a process that was sent the tokenizer."""
        self.process = process
        self.grammars: dict[int, PooledGrammar] = {}
        self.compiling: PooledGrammar | None = None
        self.queued: dict[int, MaskSequence] = {}
        self.requested: dict[int, tuple[MaskSequence | None, PooledGrammar]] = {}
        self.is_loaded = False
        self.is_slow = False
        self.since_s = time.monotonic()
        self._limits = limits
        self._since_cpu_s = 0.0
        self._num_tokens = 0  # of the latest requests
        self._num_late = 0

    @property
    def is_busy(self) -> bool:
        """Whether it compiles or computes masks."""
        return self.compiling is not None or bool(self.requested)

    @property
    def is_idle(self) -> bool:
        """Whether it could compile a grammar now."""
        return self.is_loaded and not self.is_busy

    @property
    def is_late(self) -> bool:
        """Whether others should not wait for what it is doing."""
        late_s = LATE_S + LATE_S_PER_TOKEN * self._num_tokens
        return self.is_busy and self.process.cpu_s() - self._since_cpu_s > late_s

    @property
    def is_prompt(self) -> bool:
        """Whether it is busy, and a step may wait for its masks."""
        return bool(self.requested) and not self._num_late

    @property
    def current(self) -> tuple[MaskSequence | None, PooledGrammar | None]:
        """The sequence and the grammar that it is working on; None where unknown."""
        if self.compiling is not None:
            return None, self.compiling
        return self.requested.get(self.process.note() & ~PATH_NOTE, (None, None))

    @property
    def is_on_path(self) -> bool:
        """Whether it is computing a path, which no output depends on."""
        return self.process.note() & PATH_NOTE > 0

    def overdue(self, now_s: float) -> bool:
        """Return whether it has not replied for longer than any work may take."""
        limits = self._limits
        if not self.is_loaded:
            return now_s - self.since_s > START_S
        limit_s = limits.mask_wall_s if self.requested else limits.compile_wall_s
        return self.is_busy and now_s - self.since_s > limit_s

    def compile(self, grammar: PooledGrammar) -> None:
        """Begin to compile a grammar; the worker is idle."""
        self._begin()
        self._num_tokens = 0
        self.compiling = self.grammars[grammar.number] = grammar
        self.process.send(
            {
                "op": "compile", "grammar": grammar.number, "source": grammar.source,
                "memory_bytes": self._limits.memory_bytes, "cpu_s": self._limits.compile_cpu_s,
            }
        )  # fmt: skip

    def queue(self, sequence: MaskSequence) -> None:
        """Request a mask with the next message, unless a reply is still to come."""
        if sequence.number not in self.requested:
            self.queued[sequence.number] = sequence

    def send_requests(self) -> None:
        """Send the tokens of the queued sequences, unless a grammar is being compiled."""
        self.process.flush()
        if not self.queued or self.compiling is not None:
            return
        if not self.requested:
            self._begin()
            self._num_tokens = 0
        tokens, grammars = [], []
        paths: dict[int, PathRequest] = {}
        for index, (number, sequence) in enumerate(self.queued.items()):
            assert sequence.pooled is not None
            prompt = () if sequence.num_sent else sequence.prompt
            if sequence.pooled.has_paths and (prompt or sequence.path_limit):
                paths[index] = PathRequest(sequence.path_limit, sequence.ngram, prompt)
            tokens.append(sequence.tokens[sequence.num_sent :])
            grammars.append(sequence.pooled.number)
            sequence.num_sent = len(sequence.tokens)
            self._num_tokens += len(tokens[-1])
            self.requested[number] = (sequence, sequence.pooled)
        self.process.send(
            {
                "op": "next", "sequences": list(self.queued), "grammars": grammars,
                "tokens": tokens, "cpu_s": self._limits.mask_cpu_s, "paths": paths,
            }
        )  # fmt: skip
        self.queued = {}

    def store_masks(self, header: dict[str, Any], body: bytes) -> None:
        """Store the masks and errors of a reply."""
        now_s = time.monotonic()
        is_late = now_s - self.since_s > PROMPT_S
        self._num_late = _LATE_REPLIES if is_late else max(0, self._num_late - 1)
        self._begin()
        end, errors = 0, header["errors"]
        items = zip(header["sequences"], header["cpu_s"], header["sizes"], strict=True)
        for index, (number, cpu_s, size) in enumerate(items):
            path, num_forced, is_lost = header["paths"].get(str(index), _NO_PATH)
            ends = [end + size * count for count in range(len(path) + 2)]
            masks = [body[begin:end] for begin, end in itertools.pairwise(ends)]
            end = ends[-1]
            sequence, grammar = self.requested.pop(number)
            if is_lost:
                grammar.has_paths = False
            if sequence is None:
                continue  # released since
            sequence.cpu_s += cpu_s
            sequence.num_masks += 1
            if str(index) in errors:
                sequence.error = not_usable(str(errors[str(index)]))
            elif sequence.cpu_s > self._limits.sequence_cpu_s(sequence.num_masks):
                sequence.error = limit_error("total", self._limits)
            else:
                sequence.store(masks[0], tuple(map(int, path)), tuple(masks[1:]), num_forced)
                if is_lost:
                    sequence.num_sent = 0
                if sequence.needs_mask:
                    self.queue(sequence)

    def note_lateness(self) -> None:
        """Have steps not wait for it for a while, if its reply is late."""
        if self.requested and time.monotonic() - self.since_s > PROMPT_S:
            self._num_late = _LATE_REPLIES

    def slow_down(self) -> None:
        """Lower the worker's priority for good."""
        if not self.is_slow:
            self.is_slow = True
            self.process.slow_down()

    def release(self, sequences: Sequence[int], grammars: Sequence[int] = ()) -> None:
        """Forget sequences, and grammars whose sequences they are."""
        for number in sequences:
            self.queued.pop(number, None)
            if number in self.requested:
                self.requested[number] = (None, self.requested[number][1])
        for grammar in grammars:
            del self.grammars[grammar]
        self.process.send({"op": "free", "sequences": sequences, "grammars": grammars})

    def finish_compiling(self) -> PooledGrammar | None:
        """Return the grammar that was being compiled, and compile no longer."""
        grammar, self.compiling = self.compiling, None
        self._begin()
        return grammar

    def _begin(self) -> None:
        """Measure time from now on."""
        self.since_s, self._since_cpu_s = time.monotonic(), self.process.cpu_s()
