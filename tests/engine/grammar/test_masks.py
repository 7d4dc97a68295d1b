"""Mask requests: one message per step, and errors that affect one sequence only."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.grammar.limits import GrammarLimits
from nanovllm.engine.sandbox.process import WorkerProcess
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineNotReadyError, InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputs
from tests.support.grammars import AMBIGUOUS, begun, children_of, is_running

VOCAB = 267
WAIT_S = 60.0


def make(tokenizer: Tokenizer, **limits: Any) -> Grammars:
    return Grammars(tokenizer, VOCAB, [VOCAB - 1], GrammarLimits(**limits))


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = make(tokenizer, mask_cpu_s=0.2)
    yield made
    made.close()


def messages_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list to which each request of masks is added."""
    sent: list[dict[str, Any]] = []
    send = WorkerProcess.send

    def record(process: WorkerProcess, header: dict[str, Any], body: bytes = b"") -> None:
        if header["op"] == "next":
            sent.append(header)
        send(process, header, body)

    monkeypatch.setattr(WorkerProcess, "send", record)
    return sent


def test_a_step_sends_one_message(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = messages_of(monkeypatch)
    requests = [grammars.for_request(StructuredOutputs(regex=f"[ab]*{end}")) for end in "xy"]
    sequences = [request.start() for request in requests for _ in range(5)]
    for sequence in sequences:
        sequence.wait()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    for token in (a, b):
        for sequence in sequences:
            sequence.accept(token)
        grammars.flush()
        for sequence in sequences:
            assert {a, b} <= set(sequence.allowed_ids().tolist())
    assert [header["tokens"] for header in sent] == [[[a]] * 10, [[b]] * 10]
    assert not any(header["paths"] for header in sent), "nothing asks for drafts"


def test_the_allowed_ids_are_those_of_the_mask(grammars: Grammars, tokenizer: Tokenizer) -> None:
    sequence = grammars.for_request(StructuredOutputs(regex="a[^a]b?")).start()
    for text in "axb":
        ids = sequence.allowed_ids()
        assert ids.tolist() == np.flatnonzero(sequence.allowed_mask()).tolist()
        assert sequence.allowed_ids() is ids
        sequence.accept(tokenizer.encode(text)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of processor time")
def test_a_sequence_over_its_budget_fails_alone_in_its_batch(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    rules = str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "b" | "a" s\n')
    request = grammars.for_request(StructuredOutputs(grammar=rules))
    sequences = [request.start() for _ in range(5)]
    for sequence, text in zip(sequences, "bbabb", strict=True):
        sequence.accept(tokenizer.encode(text)[0])
    for sequence in sequences[:2] + sequences[3:]:
        assert sequence.allowed_ids().tolist() == [VOCAB - 1]
    with pytest.raises(InvalidRequestError, match=r"0\.2 s for one token|too ambiguous"):
        sequences[2].allowed_mask()


def test_the_masks_along_a_path_are_known_at_once(
    grammars: Grammars, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = messages_of(monkeypatch)
    request = grammars.for_request(StructuredOutputs(regex="xyz[ab]*"))
    sequence, plain = request.start(), request.start()
    sequence.wait()
    sequence.path_limit, sequence.ngram = 6, (1, 2)
    sequence.prompt = tokenizer.encode("xyzabab")
    for index, token in enumerate(tokenizer.encode("xyzabab")):
        sequence.accept(token)
        plain.accept(token)
        assert sequence.is_ready == (index > 0)
        assert sequence.allowed_ids().tolist() == plain.allowed_ids().tolist()
        if index < 6:
            assert sequence.num_forced == max(2 - index, 0)
            assert sequence.draft(3) == tuple(tokenizer.encode("yzabab"))[index : index + 3]
    mine = [header for header in sent if sequence.number in header["sequences"]]
    assert len(mine) == 2, "the second asks for another path"
    assert sequence.num_masks >= plain.num_masks


def test_a_path_ends_before_a_token_that_the_model_does_not_have(grammars: Grammars) -> None:
    sequence = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    sequence.path, sequence.path_masks = (5, VOCAB, 6), (b"",) * 3
    assert sequence.draft(3) == (5,)
    sequence.path = (-1, 5, 6)
    assert sequence.draft(3) == ()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of processor time")
def test_a_path_that_reaches_a_limit_fails_nothing(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """The mask after `a` takes too long, but the output goes on with `b`."""
    rules = str(AMBIGUOUS["grammar"]).replace("start: s\n", 'start: "x" ("b" | "a" s)\n')
    request = grammars.for_request(StructuredOutputs(grammar=rules))
    x, a, b = (tokenizer.encode(text)[0] for text in "xab")
    for _ in range(3):
        sequence = request.start()
        sequence.wait()
        sequence.path_limit, sequence.ngram, sequence.prompt = 3, (1, 1), (x, a)
        sequence.accept(x)
        assert sequence.allowed_ids().tolist() == [a, b]
        assert not sequence.path
        sequence.accept(b)
        assert sequence.allowed_ids().tolist() == [VOCAB - 1]
        sequence.close()
    assert sequence.pooled is not None
    assert not sequence.pooled.has_paths


def test_tokens_beyond_the_socket_buffer_arrive(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """So many tokens are sent again where a worker is replaced."""
    request = grammars.for_request(StructuredOutputs(regex="[ab]*"))
    sequences = [request.start() for _ in range(30)]
    for sequence in sequences:
        sequence.wait()
    processes = children_of(os.getpid())
    for sequence in sequences:
        for token in tokenizer.encode("a") * 9000:
            sequence.accept(token)
    end_s = time.monotonic() + WAIT_S
    while not all(sequence.is_ready for sequence in sequences):
        assert time.monotonic() < end_s
        grammars.wait(0.1)
    assert children_of(os.getpid()) == processes


def test_a_closed_sequence_leaves_a_prompt_worker_running(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """A stop string ends a sequence while its next mask is computed."""
    request = grammars.for_request(StructuredOutputs(regex="[ab]*"))
    request.start().wait()
    processes = children_of(os.getpid())
    for _ in range(3):
        sequence = request.start()
        for _ in range(2):
            sequence.accept(tokenizer.encode("a")[0])
            sequence.allowed_mask()
        sequence.accept(tokenizer.encode("a")[0])
        grammars.flush()
        sequence.close()
        grammars.poll()
    assert children_of(os.getpid()) == processes


def test_closing_ends_every_wait(tokenizer: Tokenizer) -> None:
    grammars = make(tokenizer, max_grammars=1)
    first = grammars.for_request(StructuredOutputs(regex="[ab]*")).start()
    first.wait()
    waiting = begun(grammars, StructuredOutputs(regex="[ab]*x"))
    grammars.close()
    first.accept(tokenizer.encode("a")[0])
    for sequence in (first, waiting):
        with pytest.raises(EngineNotReadyError):
            sequence.wait()


PARENT = """
import os, sys, time
from pathlib import Path
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputs

grammars = Grammars(Tokenizer.load(Path(sys.argv[1])), 267, [266])
grammars.for_request(StructuredOutputs(regex="a")).start().wait()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_parent_for_a_forked_process(tiny_model: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tiny_model)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        forked = int(parent.stdout.readline())
        try:
            workers = [pid for pid in children_of(parent.pid) if pid != forked]
            assert len(workers) == 1
            parent.kill()
            end_s = time.monotonic() + 20
            while any(is_running(pid) for pid in workers):
                assert time.monotonic() < end_s
                time.sleep(0.01)
        finally:
            os.kill(forked, signal.SIGKILL)
