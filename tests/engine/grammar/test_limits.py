"""Grammars that exceed limits of stack, memory or time fail, and affect no other grammar."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.grammar.grammar import Grammars, SequenceGrammar
from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.grammar.states import GrammarState
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineNotReadyError, InvalidRequestError, QueueFullError
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import (
    AMBIGUOUS,
    DEEP_RULES,
    ENDLESS_MULTIPLE,
    LARGE_MULTIPLE,
    begun,
    children_of,
    compiled,
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


def wait_until(condition: Callable[[], bool], grammars: Grammars | None = None) -> None:
    """Wait, and poll as an engine does."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)
        if grammars is not None:
            grammars.poll()


def state_of(grammar: SequenceGrammar) -> GrammarState:
    assert grammar.pooled is not None
    return grammar.pooled.state


def follow(grammar: SequenceGrammar, tokens: int) -> list[int]:
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
    bystander = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    follow(bystander, 2)
    for _ in range(2):  # the second time its error is cached
        with pytest.raises(InvalidRequestError, match=message) as caught:
            compiled(grammars, StructuredOutputs(**fields))
        assert caught.value.param == "structured_outputs"
    follow(bystander, 2)
    assert bystander.error is None
    grammars.close()


def test_nobody_waits_for_the_compilation_of_another(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0)
    sequence = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    follow(sequence, 2)
    slow = begun(grammars, StructuredOutputs(**ENDLESS_MULTIPLE))
    wait_until(lambda: state_of(slow) is GrammarState.COMPILING, grammars)
    compiled(grammars, StructuredOutputs(regex="b"))
    follow(sequence, 2)
    assert state_of(slow) is GrammarState.COMPILING
    grammars.close()
    assert isinstance(slow.error, EngineNotReadyError), "closing ends it"


def test_new_grammars_that_take_long_leave_a_worker_to_those_that_do_not(
    tokenizer: Tokenizer,
) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0)
    sequence = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    follow(sequence, 2)
    slow = [begun(grammars, endless(number)) for number in range(4)]
    for _ in range(5):
        follow(sequence, 2)
        time.sleep(0.1)
    wait_until(lambda: grammars.pool.num_compiling == 2, grammars)
    follow(sequence, 2)
    states = [state_of(one) for one in slow]
    assert states == [GrammarState.COMPILING] * 2 + [GrammarState.WAITING] * 2
    grammars.close()


def test_compiling_ends_when_nobody_waits_for_it(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, num_workers=1)
    compiled(grammars, StructuredOutputs(regex="a"))
    first, second = (begun(grammars, StructuredOutputs(**ENDLESS_MULTIPLE)) for _ in range(2))
    assert first.pooled is second.pooled
    wait_until(lambda: state_of(first) is GrammarState.COMPILING, grammars)
    time.sleep(0.2)
    waiting = begun(grammars, StructuredOutputs(regex="b"))
    waiting.close()
    assert grammars.pool.num_unsettled == 1, "nobody needs it"
    first.close()
    grammars.poll()
    assert state_of(second) is GrammarState.COMPILING, "one sequence is left"
    second.close()
    compiled(grammars, StructuredOutputs(regex="b"))
    again = begun(grammars, StructuredOutputs(**ENDLESS_MULTIPLE))
    assert again.pooled is not first.pooled, "it may be tried again"
    grammars.close()


def test_a_request_that_the_engine_never_has_compiles_nothing(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer)
    grammars.for_request(StructuredOutputs(regex="a")).start().close()
    assert grammars.pool.num_unsettled == 0
    grammars.close()


def endless(number: int) -> StructuredOutputs:
    return StructuredOutputs(json={"multipleOf": 9_999_991 + 2 * number})


def test_only_so_many_wait(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, num_workers=1, max_waiting=2)
    held = [begun(grammars, endless(number)) for number in range(3)]
    assert grammars.is_full
    refused = begun(grammars, endless(3))
    assert isinstance(refused.error, QueueFullError)
    assert "3 grammars of other requests wait" in str(refused.error)
    assert begun(grammars, endless(0)).pooled is held[0].pooled
    grammars.close()
    assert isinstance(begun(grammars, StructuredOutputs(regex="a")).error, EngineNotReadyError)


def test_a_newcomer_displaces_a_grammar_that_waits_and_takes_turns(tokenizer: Tokenizer) -> None:
    limits = {"memory_bytes": 64 << 20, "num_workers": 1, "max_waiting": 4}
    grammars = make(tokenizer, compile_cpu_s=60.0, **limits)
    compiled(grammars, StructuredOutputs(regex="a"))
    held = [begun(grammars, endless(number), "many") for number in range(5)]
    mine = begun(grammars, StructuredOutputs(regex="[ab]*k"), "few")
    assert isinstance(held[4].error, QueueFullError), "it is the newest"
    assert isinstance(begun(grammars, endless(5), "many").error, QueueFullError)
    held[0].close()  # the next one may be compiled before the newcomer's, and no other
    assert mine.wait()
    assert [one.error is None for one in held[1:]] in (
        [True] * 3 + [False],
        [False, True, True, False],
    )
    grammars.close()


def test_a_grammar_makes_way_for_the_requests_of_one_client_only(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, compile_cpu_s=60.0, num_workers=1, max_waiting=4)
    held = [begun(grammars, endless(number), "many") for number in range(5)]
    shared = begun(grammars, endless(4), "other")
    mine = begun(grammars, StructuredOutputs(regex="[ab]*k"), "few")
    assert mine.error is None
    assert isinstance(held[4].error, QueueFullError)
    assert shared.error is None, "another client needs the newest grammar"
    assert isinstance(held[3].error, QueueFullError), "the newest that nobody else needs"
    grammars.close()


def test_a_newcomer_takes_the_place_of_the_client_with_most(tokenizer: Tokenizer) -> None:
    """Whose sequence goes on once there is room again."""
    grammars = make(tokenizer, max_grammars=2)
    many = [
        grammars.for_request(StructuredOutputs(regex=f"[ab]{{9}}{name}"), "many").start()
        for name in "xy"
    ]
    for sequence in many:
        follow(sequence, 2)
    newcomer = grammars.for_request(StructuredOutputs(regex="[ab]{9}z"), "few").start()
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
    request = grammars.for_request(StructuredOutputs(grammar=rules))
    harmless, harmful = request.start(), request.start()
    harmful.accept(tokenizer.encode("a")[0])
    with pytest.raises(InvalidRequestError, match=r"0\.2 s for one token|too ambiguous"):
        harmful.allowed_mask()
    harmless.accept(tokenizer.encode("b")[0])
    assert np.flatnonzero(harmless.allowed_mask()).tolist() == [VOCAB - 1]
    grammars.close()


def test_all_masks_of_a_sequence_together_are_bounded(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, request_cpu_s=0.0, request_cpu_s_per_mask=0.0)
    sequence = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    sequence.accept(tokenizer.encode("a")[0])
    while sequence.error is None:
        grammars.wait(0.1)
    assert "too long over all tokens" in str(sequence.error)
    grammars.close()


def test_a_worker_that_is_killed_is_replaced(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Its sequences continue with the same masks."""
    request = grammars.for_request(StructuredOutputs(regex="[ab]x{3}yz"))
    expected = follow(request.start(), 5)
    one, other = request.start(), request.start()
    first = follow(one, 2), follow(other, 3)
    for pid in children_of(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    assert first[0] + follow(one, 3) == first[1] + follow(other, 2) == expected


def test_the_second_sequence_that_ends_a_worker_fails_its_grammar(tokenizer: Tokenizer) -> None:
    rules = str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "b" | "a" s\n')
    grammars = make(tokenizer, mask_cpu_s=0.2)
    request = grammars.for_request(StructuredOutputs(grammar=rules))
    harmless = request.start()
    harmless.wait()
    for _ in range(2):
        assert harmless.error is None
        harmful = request.start()
        harmful.accept(tokenizer.encode("a")[0])
        with pytest.raises(InvalidRequestError, match=r"0\.2 s for one token"):
            harmful.wait()
    assert isinstance(harmless.error, InvalidRequestError)
    assert isinstance(begun(grammars, StructuredOutputs(grammar=rules)).error, InvalidRequestError)
    grammars.close()


def test_idle_grammars_make_room(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, max_grammars=2)
    sequences = [
        grammars.for_request(StructuredOutputs(regex=f"{i}[ab]*")).start() for i in range(5)
    ]
    for sequence in sequences:
        sequence.wait()
        sequence.close()
    states = [state_of(one) for one in sequences]
    assert states == [GrammarState.EVICTED] * 3 + [GrammarState.READY] * 2
    for i in range(5):
        sequence = grammars.for_request(StructuredOutputs(regex=f"{i}[ab]*")).start()
        follow(sequence, 3)
        sequence.close()
    assert sum(state_of(one) is GrammarState.READY for one in sequences) <= 2
    grammars.close()


def test_a_request_without_a_place_is_told(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, max_grammars=1, max_wait_s=0.3)
    sequence = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    follow(sequence, 2)
    with pytest.raises(QueueFullError, match="occupy all workers; try again later"):
        compiled(grammars, StructuredOutputs(regex="b*"))
    sequence.close()
    compiled(grammars, StructuredOutputs(regex="b*"))
    grammars.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_memory_makes_room_too(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, memory_bytes=64 << 20, max_bytes=70 << 20, compile_cpu_s=30.0)
    large = grammars.for_request(StructuredOutputs(**LARGE_MULTIPLE)).start()
    large.wait()
    large.close()
    assert large.pooled is not None
    assert large.pooled.num_bytes > 8 << 20
    compiled(grammars, StructuredOutputs(regex="a"))
    assert state_of(large) is GrammarState.EVICTED
    grammars.close()


def test_it_may_be_used_after_a_fork_of_a_user(grammars: Grammars) -> None:
    compiled(grammars, StructuredOutputs(regex="a"))
    pid = os.fork()
    if pid == 0:
        status = 1
        with suppress(BaseException):
            status = int(not follow(grammars.for_request(StructuredOutputs(regex="ab")).start(), 2))
        os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    compiled(grammars, StructuredOutputs(regex="abc"))


PARENT = """
import sys, time
from pathlib import Path
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs

grammars = Grammars(Tokenizer.load(Path(sys.argv[1])), 267, [266])
grammars.for_request(StructuredOutputs(regex="a")).start().wait()
for divisor in (9999991, 9999993):
    grammars.for_request(StructuredOutputs(json={"multipleOf": divisor})).start().open()
end_s = time.monotonic() + 0.5
while time.monotonic() < end_s:
    grammars.poll()
    time.sleep(0.01)
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
        assert len(children) == 2, "a worker that is late, and one that starts"
        parent.kill()
    wait_until(lambda: not any(is_running(pid) for pid in children))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_and_forgetting_end_all_processes(tokenizer: Tokenizer) -> None:
    before = set(children_of(os.getpid()))
    for ends in (Grammars.close, None):
        grammars = make(tokenizer)
        compiled(grammars, StructuredOutputs(regex="a"))
        assert set(children_of(os.getpid())) > before
        if ends is not None:
            ends(grammars)
        del grammars
        wait_until(lambda: set(children_of(os.getpid())) <= before)


def test_a_worker_imports_little() -> None:
    """So it starts quickly, and its forks share little memory."""
    code = (
        "import sys; import nanovllm.engine.sandbox.main, nanovllm.engine.sandbox.grammar_worker; "
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
    sequence = begun(grammars, StructuredOutputs(regex="("))
    wait_until(lambda: sequence.error is not None, grammars)
    assert isinstance(sequence.error, InvalidRequestError)
    with pytest.raises(InvalidRequestError):
        sequence.allowed_mask()
