"""Grammars that exceed limits of stack, memory or time fail, and affect no other grammar."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from nanovllm.engine.grammar import pool_thread as grammar_pool_thread
from nanovllm.engine.grammar.grammar import CompiledGrammar, Grammar, Grammars
from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.table import GrammarState
from nanovllm.engine.sandbox.launcher import SpawnLauncher, Tokens
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import (
    EngineNotReadyError,
    InvalidRequestError,
    NanovllmError,
    QueueFullError,
)
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import (
    AMBIGUOUS,
    DEEP_RULES,
    ENDLESS_MULTIPLE,
    LARGE_MULTIPLE,
    children_of,
    is_running,
)

VOCAB = 267
WAIT_S = 60.0


def make(tokenizer: Tokenizer, **limits: Any) -> Grammars:
    return Grammars(tokenizer, VOCAB, [VOCAB - 1], GrammarLimits(**limits))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = make(tokenizer, memory_bytes=64 << 20, compile_cpu_s=0.5, mask_cpu_s=0.2)
    yield made
    made.close()


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def follow(grammar: Grammar, tokens: int) -> list[int]:
    """Accept the lowest allowed token, several times."""
    taken = []
    for _ in range(tokens):
        taken.append(int(np.flatnonzero(grammar.allowed_mask())[0]))
        grammar.accept(taken[-1])
    return taken


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "stack": (DEEP_RULES, "rules of the grammar are nested too deeply; make it simpler"),
    "memory": (ENDLESS_MULTIPLE, "needs more than 64 MiB of memory; make it simpler"),
    "time": (AMBIGUOUS, r"takes more than 0\.5 s to compile or 0\.2 s for one token; make"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory and processor time")
@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_ends_alone(tokenizer: Tokenizer, name: str) -> None:
    fields, message = BOMBS[name]
    cpu_s = 20.0 if name == "memory" else 0.5
    grammars = make(tokenizer, memory_bytes=64 << 20, compile_cpu_s=cpu_s, mask_cpu_s=0.2)
    bystander = grammars.compile(StructuredOutputs(regex="[ab]*")).start()
    follow(bystander, 2)
    for _ in range(2):  # the second time its error is cached
        with pytest.raises(InvalidRequestError, match=message) as caught:
            grammars.compile(StructuredOutputs(**fields))
        assert caught.value.param == "structured_outputs"
    follow(bystander, 2)
    assert bystander.error is None
    grammars.close()


def test_nobody_waits_for_the_compilation_of_another(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, max_compiling=2)
    grammars.compile(StructuredOutputs(regex="a"))
    slow = grammars.begin(StructuredOutputs(**ENDLESS_MULTIPLE))
    wait_until(lambda: slow.pooled.state is GrammarState.COMPILING)
    assert grammars.compile(StructuredOutputs(regex="b")).error is None
    assert slow.pooled.state is GrammarState.COMPILING
    grammars.close()
    assert isinstance(slow.error, EngineNotReadyError), "closing ends it"


def test_compiling_ends_when_nobody_waits_for_it(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, max_compiling=1)
    grammars.compile(StructuredOutputs(regex="a"))
    slow = grammars.begin(StructuredOutputs(**ENDLESS_MULTIPLE))
    first, second = threading.Event(), threading.Event()
    slow.watch(first.set)
    slow.watch(second.set)
    wait_until(lambda: slow.pooled.state is GrammarState.COMPILING)
    slow.unwatch(first.set)
    grammars.begin(StructuredOutputs(regex="b"))
    assert slow.pooled.state is GrammarState.COMPILING, "one client is left"
    slow.unwatch(second.set)
    assert grammars.compile(StructuredOutputs(regex="b")).error is None, "a worker is free"
    assert slow.error is not None
    assert grammars.begin(StructuredOutputs(**ENDLESS_MULTIPLE)) is not slow, "may be tried again"
    grammars.close()


def test_compiling_ends_when_nobody_holds_the_grammar(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, max_compiling=1, max_wait_s=600.0)
    slow = StructuredOutputs(**ENDLESS_MULTIPLE)
    first, second = grammars.begin(slow), grammars.begin(slow)
    waiting = grammars.begin(StructuredOutputs(regex="b"))
    pooled, waits = first.pooled, waiting.pooled
    wait_until(lambda: pooled.state is GrammarState.COMPILING)
    del first, waiting
    wait_until(lambda: waits.error is not None)
    assert pooled.state is GrammarState.COMPILING, "one holder is left"
    del second
    done = grammars.compile(StructuredOutputs(regex="c"))
    assert pooled.error is not None
    kept = done.pooled
    del done
    assert grammars.compile(StructuredOutputs(regex="c")).pooled is kept, "the result is kept"
    grammars.close()


def test_a_watched_grammar_is_compiled_without_a_holder(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer)
    settled = threading.Event()
    compiled = grammars.begin(StructuredOutputs(regex="[ab]*d"))
    pooled = compiled.pooled
    compiled.watch(settled.set)
    del compiled
    assert settled.wait(WAIT_S)
    assert pooled.error is None
    grammars.close()


def test_a_finalizer_may_run_while_the_pool_is_locked(tokenizer: Tokenizer) -> None:
    """A grammar may be deleted on any thread at any time, also after the pool was closed."""
    grammars = make(tokenizer)
    pool = grammars.pool
    locks = (pool._table._lock, pool._thread.commands.lock)  # noqa: SLF001
    for closes in (False, True):
        held = [grammars.begin(StructuredOutputs(regex="[ab]*f"))]
        if closes:
            grammars.close()
        deleter = threading.Thread(target=held.clear, daemon=True)
        with locks[0], locks[1]:
            deleter.start()
            deleter.join(WAIT_S)
            assert not deleter.is_alive()


def test_only_so_many_wait(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, max_compiling=1, max_waiting=2)
    specs = [dict(ENDLESS_MULTIPLE, json={"multipleOf": 9_999_991 + 2 * i}) for i in range(4)]
    held = [grammars.begin(StructuredOutputs(**one)) for one in specs[:3]]
    assert grammars.is_full
    with pytest.raises(QueueFullError, match="3 grammars of other requests wait"):
        grammars.begin(StructuredOutputs(**specs[3]))
    assert grammars.begin(StructuredOutputs(**specs[0])).pooled is held[0].pooled
    grammars.close()
    with pytest.raises(EngineNotReadyError):
        grammars.begin(StructuredOutputs(regex="a"))


def test_closing_does_not_wait_for_a_process_that_starts_slowly(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is sent a large vocabulary on a busy machine: a signal must end the server."""
    begun, may_go_on = threading.Event(), threading.Event()

    def start_slowly(tokens: Tokens) -> NoReturn:
        begun.set()
        may_go_on.wait(WAIT_S)
        raise OSError("too late")

    monkeypatch.setattr(grammar_pool_thread, "make_launcher", start_slowly)
    monkeypatch.setattr(grammar_pool_thread, "END_S", 0.01)
    grammars = make(tokenizer)
    waiting = grammars.begin(StructuredOutputs(regex="[ab]*m"))
    assert begun.wait(WAIT_S)
    closer = threading.Thread(target=grammars.close, daemon=True)
    closer.start()
    closer.join(WAIT_S / 2)
    has_ended = not closer.is_alive()
    may_go_on.set()
    assert has_ended
    wait_until(lambda: waiting.error is not None)


def endless(number: int) -> StructuredOutputs:
    return StructuredOutputs(json={"multipleOf": 9_999_991 + 2 * number})


def test_a_newcomer_displaces_a_grammar_that_waits_and_takes_turns(tokenizer: Tokenizer) -> None:
    limits = {"memory_bytes": 64 << 20, "max_compiling": 1, "max_waiting": 4}
    grammars = make(tokenizer, compile_cpu_s=60.0, **limits)
    held = {number: grammars.begin(endless(number), "many") for number in range(5)}
    settled: list[int] = []
    for number in (2, 3, 4):
        held[number].watch(partial(settled.append, number))
    mine = grammars.begin(StructuredOutputs(regex="[ab]*k"), "few")
    mine.watch(partial(settled.append, -1))
    wait_until(lambda: 4 in settled)
    assert isinstance(held[4].error, QueueFullError), "it is the newest"
    with pytest.raises(QueueFullError, match="5 grammars of other requests wait"):
        grammars.begin(endless(5), "many")
    del held[0]  # the next one may be compiled before the newcomer's, and no other
    wait_until(lambda: -1 in settled)
    assert mine.error is None
    assert settled == [4, -1]
    grammars.close()


def test_a_newcomer_takes_a_worker_of_the_client_with_most(tokenizer: Tokenizer) -> None:
    """Whose sequence goes on once a worker is free again."""
    grammars = make(tokenizer, max_workers=2)
    many = [
        grammars.compile(StructuredOutputs(regex=f"[ab]{{9}}{name}"), "many").start()
        for name in "xyz"[:2]
    ]
    for sequence in many:
        follow(sequence, 2)
    newcomer = grammars.compile(StructuredOutputs(regex="[ab]{9}z"), "few").start()
    follow(newcomer, 9)
    newcomer.accept(int(newcomer.allowed_ids()[0]))
    newcomer.close()
    for sequence in many:
        follow(sequence, 7)
        assert sequence.error is None
    grammars.close()


def test_a_mask_that_takes_too_long_ends_its_sequence(tokenizer: Tokenizer) -> None:
    """The grammar's first mask is fast."""
    rules = str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "b" | "a" s\n')
    grammars = make(tokenizer, mask_cpu_s=0.2)
    compiled = grammars.compile(StructuredOutputs(grammar=rules))
    harmless, harmful = compiled.start(), compiled.start()
    harmful.accept(tokenizer.encode("a")[0])
    with pytest.raises(InvalidRequestError, match=r"0\.2 s for one token|too ambiguous"):
        harmful.allowed_mask()
    harmless.accept(tokenizer.encode("b")[0])
    assert np.flatnonzero(harmless.allowed_mask()).tolist() == [VOCAB - 1]
    grammars.close()


def test_all_masks_of_a_sequence_together_are_bounded(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, request_cpu_s=0.0, request_cpu_s_per_mask=0.0)
    sequence = grammars.compile(StructuredOutputs(regex="[ab]*")).start()
    sequence.accept(tokenizer.encode("a")[0])
    while sequence.error is None:
        grammars.wait(0.1)
    assert "too long over all tokens" in str(sequence.error)
    grammars.close()


def test_a_worker_that_is_killed_is_replaced(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Its sequences continue with the same masks."""
    expected = follow(grammars.compile(StructuredOutputs(regex="[ab]x{3}yz")).start(), 5)
    compiled = grammars.compile(StructuredOutputs(regex="[ab]x{3}yz"))
    one, other = compiled.start(), compiled.start()
    first = follow(one, 2), follow(other, 3)
    (server,) = children_of(os.getpid())[:1]
    for pid in children_of(server):
        os.kill(pid, signal.SIGKILL)
    assert first[0] + follow(one, 3) == first[1] + follow(other, 2) == expected


def test_the_process_that_forks_is_replaced(grammars: Grammars) -> None:
    sequence = grammars.compile(StructuredOutputs(regex="[ab]x{3}yw")).start()
    follow(sequence, 2)
    os.kill(children_of(os.getpid())[0], signal.SIGKILL)
    follow(sequence, 2)
    assert grammars.compile(StructuredOutputs(regex="x")).error is None


def test_idle_workers_make_room(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, max_workers=2)
    compiled = [grammars.compile(StructuredOutputs(regex=f"{i}[ab]*")) for i in range(5)]
    states = [one.pooled.state for one in compiled]
    assert states == [GrammarState.EVICTED] * 3 + [GrammarState.READY] * 2
    sequences = [one.start() for one in compiled]
    for sequence in sequences:  # uses a worker from the second token until it is closed
        follow(sequence, 3)
        sequence.close()
    assert sum(one.pooled.state is GrammarState.READY for one in compiled) <= 2
    grammars.close()


def test_a_request_without_a_place_is_told(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, max_workers=1, max_wait_s=0.3)
    sequence = grammars.compile(StructuredOutputs(regex="[ab]*")).start()
    follow(sequence, 2)
    with pytest.raises(QueueFullError, match="occupy all workers; try again later"):
        grammars.compile(StructuredOutputs(regex="b*"))
    sequence.close()
    grammars.poll()
    assert grammars.compile(StructuredOutputs(regex="b*")).error is None
    grammars.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_memory_makes_room_too(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, memory_bytes=64 << 20, max_bytes=70 << 20, compile_cpu_s=30.0)
    large = grammars.compile(StructuredOutputs(**LARGE_MULTIPLE))
    assert large.pooled.num_bytes > 8 << 20
    assert grammars.compile(StructuredOutputs(regex="a")).error is None
    assert large.pooled.state is GrammarState.EVICTED
    grammars.close()


def test_without_fork_each_grammar_has_a_process_of_its_own(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_pool_thread, "make_launcher", SpawnLauncher)
    grammars = make(tokenizer, mask_cpu_s=0.2)
    sequence = grammars.compile(StructuredOutputs(regex="[ab]x{3}yz")).start()
    tokens = follow(sequence, 5)
    assert tokenizer.decode(tokens) == "axxxy"
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        grammars.compile(StructuredOutputs(**DEEP_RULES))
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        grammars.compile(StructuredOutputs(regex="("))
    grammars.close()


def test_it_may_be_used_after_a_fork_of_a_user(grammars: Grammars) -> None:
    grammars.compile(StructuredOutputs(regex="a"))
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            status = int(not follow(grammars.compile(StructuredOutputs(regex="ab")).start(), 2))
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert grammars.compile(StructuredOutputs(regex="abc")).error is None


PARENT = """
import sys, time
from pathlib import Path
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs

grammars = Grammars(Tokenizer.load(Path(sys.argv[1])), 267, [266])
grammars.compile(StructuredOutputs(regex="a"))
held = grammars.begin(StructuredOutputs(json={"multipleOf": 9999991}))
time.sleep(0.2)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_its_parent(tiny_model: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_model)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        children = children_of(parent.pid)
        assert len(children) == 3, "the fork server, a grammar, and one that compiles"
        parent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in children))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_and_forgetting_end_all_processes(tokenizer: Tokenizer) -> None:
    before = set(children_of(os.getpid()))
    for ends in (Grammars.close, None):
        grammars = make(tokenizer)
        grammars.compile(StructuredOutputs(regex="a"))
        assert set(children_of(os.getpid())) > before
        if ends is not None:
            ends(grammars)
        del grammars
        wait_until(lambda: set(children_of(os.getpid())) <= before)


def test_a_worker_imports_little() -> None:
    """So it starts quickly, and its forks share little memory."""
    code = (
        "import sys; import nanovllm.engine.sandbox.main, nanovllm.engine.sandbox.fork_server; "
        "import nanovllm.engine.sandbox.template_worker; "
        "names = ('numpy', 'numba', 'tokenizers', 'asyncio', 'pydantic'); "
        "print([name for name in names if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_errors_are_the_requests(grammars: Grammars) -> None:
    error: NanovllmError | None = None
    compiled: CompiledGrammar = grammars.begin(StructuredOutputs(regex="("))
    wait_until(lambda: compiled.error is not None)
    error = compiled.start().error
    assert isinstance(error, InvalidRequestError)
    with pytest.raises(InvalidRequestError):
        compiled.start().allowed_mask()
