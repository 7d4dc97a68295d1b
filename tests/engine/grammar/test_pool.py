"""The pool of grammars with processes that end, stall and reply at random moments."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.pool import GrammarPool
from nanovllm.engine.grammar.states import TRANSITIONS, GrammarState, MaskSequence, PooledGrammar
from nanovllm.engine.sandbox.messages import PATH_NOTE, Message
from nanovllm.engine.sandbox.process import WorkerEndedError
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError, QueueFullError


def expected_mask(key: str, tokens: Sequence[int]) -> bytes:
    text = f"{key}{list(tokens)}".encode()
    return text.ljust(1000, b".")  # all masks have one size


class FakeProcess:
    """Works on one item at a time when it is told to, and may end before any of them."""

    def __init__(self, coin: random.Random) -> None:
        self.coin = coin
        self.is_running = True
        self.has_unsent = False
        self.limit: str | None = None
        self.cpu = 0.0
        self.noted = 0
        self.is_compiling = False
        self.inbox: list[dict[str, Any]] = [{"op": "load"}]
        self.outbox: list[Message] = []
        self.grammars: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.pending: dict[int, tuple[int, list[int], Any] | None] = {}

    def fileno(self) -> int:
        raise NotImplementedError

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        assert not body
        self.inbox.append(header)

    def flush(self) -> None:
        pass

    def receive(self) -> list[Message]:
        messages, self.outbox = self.outbox, []
        if not messages and not self.is_running:
            raise WorkerEndedError(self.limit)
        return messages

    def note(self) -> int:
        return self.noted

    def cpu_s(self) -> float:
        return self.cpu

    def slow_down(self) -> None:
        pass

    def kill(self, limit: str | None) -> None:
        """End as by a limit, in the middle of an item where there is one."""
        if self.is_running:
            self.is_running, self.limit = False, limit
            self.noted = next(iter(self.pending), 0)
            item = self.pending.get(self.noted)
            if item is not None and item[2] is not None and self.coin.random() < 0.5:
                self.noted |= PATH_NOTE

    def end(self, *, waits: bool = True) -> None:
        self.is_running = False

    def close(self) -> None:
        pass

    def work(self) -> None:
        """Handle all messages that need no time, then one item."""
        while self.is_running and self.inbox:
            header = self.inbox.pop(0)
            op = header["op"]
            if op == "load":
                self.outbox.append(({"op": "loaded"}, b""))
            elif op == "compile":
                assert not self.pending, "a grammar is compiled while masks are computed"
                key = header["source"]["key"]
                self.grammars[header["grammar"]] = key
                reply = {"op": "compiled", "num_bytes": 1, "cpu_s": self.coin.choice((0.0, 1.0))}
                self.outbox.append((reply, expected_mask(key, [])))
            elif op == "next":
                assert not self.pending.keys() & set(header["sequences"])
                items = zip(header["sequences"], header["grammars"], header["tokens"], strict=True)
                for index, (number, grammar, tokens) in enumerate(items):
                    self.pending[number] = grammar, tokens, header["paths"].get(index)
            else:
                for number in header["sequences"]:
                    self.tokens.pop(number, None)
                    if number in self.pending:
                        self.pending[number] = None
                for number in header["grammars"]:
                    del self.grammars[number]
        if self.is_running and self.pending:
            self.reply()

    def reply(self) -> None:
        number = next(iter(self.pending))
        item, masks = self.pending.pop(number), [b""]
        paths: dict[str, tuple[list[int], int, bool]] = {}
        if item is not None:
            grammar, tokens, path = item
            assert not (number in self.tokens and path and path.prompt)
            self.tokens.setdefault(number, []).extend(tokens)
            tokens = self.tokens[number]
            follow = []
            if path is not None:
                follow = self.coin.choices(range(100), k=path.limit)
                is_lost = self.coin.random() < 0.1
                if is_lost:
                    del self.tokens[number]
                paths["0"] = follow, self.coin.randint(0, len(follow)), is_lost
            ends = range(len(tokens), len(tokens) + len(follow) + 1)
            masks = [
                expected_mask(self.grammars[grammar], [*tokens, *follow][:end]) for end in ends
            ]
        header = {
            "op": "masks", "sequences": [number], "cpu_s": [0.0], "errors": {},
            "sizes": [len(masks[0])], "paths": paths,
        }  # fmt: skip
        self.outbox.append((header, b"".join(masks)))


class Simulation:
    """A pool with random sequences and processes."""

    def __init__(self, seed: int) -> None:
        self.coin = random.Random(seed)
        self.processes: list[FakeProcess] = []
        self.limits = GrammarLimits(
            num_workers=self.coin.randint(1, 3), max_waiting=4, max_grammars=self.coin.randint(2, 8)
        )
        self.pool = GrammarPool(self.start, self.limits)
        self.sequences: list[MaskSequence] = []
        self.num_sequences = 0
        self.errors: list[NanovllmError] = []

    def start(self) -> Any:
        self.processes.append(FakeProcess(self.coin))
        assert sum(process.is_running for process in self.processes) <= self.limits.num_workers
        return self.processes[-1]

    def add(self) -> None:
        self.num_sequences += 1
        sequence = MaskSequence(self.num_sequences, self.coin.choice("abc"))
        sequence.ngram, sequence.prompt = (1, 2), self.coin.choice(((), (1, 2, 3)))
        key = f"k{self.coin.randint(0, 9)}"
        self.pool.add(sequence, key, {"key": key})
        self.sequences.append(sequence)

    def advance(self) -> None:
        """Accept tokens after the masks that have arrived, which are checked."""
        for sequence in self.sequences:
            if sequence.mask is None or sequence.error:
                continue
            assert sequence.pooled is not None
            assert sequence.mask == expected_mask(sequence.pooled.key, sequence.tokens)
            self.check_path(sequence)
            count = self.coin.choice((0, 1, 1, 1, 1 + len(sequence.path)))
            sequence.path_limit = self.coin.choice((0, 1, 3))
            for token in (*sequence.path, self.coin.randint(0, 99))[:count]:
                if sequence.append(token if self.coin.random() < 0.9 else 100):
                    self.pool.request(sequence)
                if sequence.mask is None:
                    break

    def check_path(self, sequence: MaskSequence) -> None:
        assert sequence.pooled is not None
        assert len(sequence.path) == len(sequence.path_masks)
        assert 0 <= sequence.num_forced <= len(sequence.path)
        for end, mask in enumerate(sequence.path_masks, 1):
            tokens = [*sequence.tokens, *sequence.path[:end]]
            assert mask == expected_mask(sequence.pooled.key, tokens)

    def release(self, index: int) -> None:
        self.pool.release(self.sequences.pop(index))

    def step(self, *, kills: bool) -> None:
        draw = self.coin.random
        if len(self.sequences) < 12 and draw() < 0.4:
            self.add()
        if self.sequences and draw() < 0.1:
            self.release(self.coin.randrange(len(self.sequences)))
        for process in self.processes:
            if kills and draw() < 0.03:
                process.kill(self.coin.choice((None, None, "memory", "time", "stack")))
            if draw() < 0.7:
                process.work()
            elif draw() < 0.3:
                process.cpu += 0.03
        self.pool.poll()
        self.pool.check_integrity()
        self.advance()
        self.pool.flush()

    def settle(self) -> None:
        """Work without more kills until each sequence has had its mask or an error."""
        for _ in range(400):
            for process in self.processes:
                process.work()
            self.pool.poll()
            self.pool.check_integrity()
            for index in reversed(range(len(self.sequences))):
                sequence = self.sequences[index]
                if sequence.error is not None:
                    self.errors.append(sequence.error)
                if sequence.error or sequence.mask:
                    self.release(index)
            if not self.sequences:
                return
            if self.coin.random() < 0.2:
                for process in self.processes:
                    process.cpu += 0.03
        pytest.fail(f"these wait for ever: {self.sequences}")


@given(st.integers(0, 2**32))
def test_every_sequence_has_the_right_mask_or_an_error(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(60):
        simulation.step(kills=True)
    simulation.settle()
    expected = (InvalidRequestError, EngineFaultError, QueueFullError)
    assert all(isinstance(error, expected) for error in simulation.errors)
    simulation.pool.poll()
    simulation.pool.check_integrity()
    assert simulation.pool.num_unsettled == simulation.pool.num_compiling
    simulation.pool.close()
    assert not any(process.is_running for process in simulation.processes)


@given(st.integers(0, 2**32))
def test_without_kills_only_a_full_queue_is_an_error(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(40):
        simulation.step(kills=False)
    simulation.settle()
    assert all(isinstance(error, QueueFullError) for error in simulation.errors)


def test_a_state_moves_as_the_table_says() -> None:
    grammar = PooledGrammar(1, "k", {}, "")
    with pytest.raises(AssertionError):
        grammar.move_to(GrammarState.READY)
    assert TRANSITIONS.keys() == set(GrammarState)
