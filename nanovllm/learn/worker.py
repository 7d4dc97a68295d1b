"""The process that runs a check: it loads the reader's files and runs one case at a time.

    -> load       folder, step, cpu_s,            <- loaded | failed: message; with printed
                  memory_bytes
    -> case       index                           <- passed | differs: text | raised: text |
                                                     unwritten: text; each with printed
    -> diagnose                                   <- mistakes: their indices
    -> find                                       <- functions: names

The messages are those of engine/sandbox/messages.py. What the reader's code prints is returned and
not mixed with the messages.
"""

import functools
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from nanovllm.engine.sandbox.limits import limit_memory, limited_cpu
from nanovllm.engine.sandbox.messages import Channel
from nanovllm.learn.checking import Case, Outcome, is_same, problem_of, run_case
from nanovllm.learn.course import STEPS, Step, step_of
from nanovllm.learn.parts import ReadersCodeError, functions_of, load_parts, load_step, mistaken
from nanovllm.learn.stubs import names_to_write

MEMORY_BYTES = 2 << 30
CPU_S = 20.0
"""Processor time of a case; a case of the solution takes less than a second."""
_MAX_PRINTED = 4000


class _Printed(io.TextIOBase):
    """Keeps the first characters that are written, and drops the others."""

    def __init__(self) -> None:
        self._text = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text += text[: _MAX_PRINTED - len(self._text)]
        return len(text)

    def take(self) -> str:
        text, self._text = self._text, ""
        return text


class Check:
    """One step's cases on the reader's module."""

    def __init__(self, step: Step, module: ModuleType, folder: Path) -> None:
        """Check `module`, which is of the reader's `folder`."""
        self._step, self._module, self._folder = step, module, folder
        self._outcomes: dict[int, Outcome] = {}

    def run(self, index: int) -> dict[str, Any]:
        """Run a case and return the reply."""
        case = self._step.cases[index]
        outcome = self._outcomes[index] = run_case(case, self._module, self._folder)
        if outcome.kind == "unwritten":
            return {"op": "unwritten", "text": outcome.text}
        if outcome.kind == "unmet":
            return {"op": "differs", "text": outcome.text}
        if outcome.kind:
            return {"op": "raised", "text": outcome.text}
        expected = case.run(self._step.solution) if case.expected is None else case.expected()
        text = problem_of(outcome, expected)
        return {"op": "passed"} if text is None else {"op": "differs", "text": text}

    def diagnose(self) -> list[int]:
        """Return the mistakes that give the same outcomes in all cases that ran."""
        return [
            number
            for number in range(len(self._step.mistakes))
            if all(
                is_same(outcome, _mistaken_outcome(self._step, number, index))
                for index, outcome in self._outcomes.items()
            )
        ]

    def suspects(self) -> list[str]:
        """Return, of the functions that the failed case calls, those that the cases reached last.

        The others have passed more cases. Calls of compiled functions are not seen; in step 12 the
        name of a case says which function it calls.
        """
        first: dict[str, int] = {}
        called: list[str] = []
        for index in self._outcomes:
            called = self._called(self._step.cases[index])
            for name in called:
                first.setdefault(name, index)
        latest = max((first[name] for name in called), default=0)
        return [name for name in called if first[name] == latest]

    def _called(self, case: Case) -> list[str]:
        """Run a case again, and return the functions of the step that it calls."""
        functions = functions_of(self._step, self._module)
        names = {id(function.__code__): name for name, function in functions.items()}
        called: dict[str, None] = {}

        def on_event(frame: FrameType, event: str, _argument: object) -> None:
            name = names.get(id(frame.f_code)) if event == "call" else None
            if name is not None:
                called[name] = None

        sys.setprofile(on_event)
        try:
            run_case(case, self._module, self._folder)
        finally:
            sys.setprofile(None)
        return list(called) or [name for name in names_to_write(self._step) if name in case.name]


@functools.cache
def _mistaken_outcome(step: Step, number: int, index: int) -> Outcome:
    """Return what a mistake gives in a case: the same in every check."""
    return run_case(step.cases[index], mistaken(step, step.mistakes[number]), Path())


def serve(channel: Channel) -> None:
    """Load the reader's files, then run cases until the socket closes."""
    received = channel.receive()
    if received is None:
        return
    header = received[0]
    folder, step, cpu_s = Path(header["folder"]), step_of(header["step"]), header["cpu_s"]
    _ = step.cases, load_parts(None, STEPS[: step.number])  # import what they need without limits
    limit_memory(header["memory_bytes"])
    printed = _Printed()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            with limited_cpu(cpu_s):
                module = load_step(folder, step)
        except ReadersCodeError as error:
            channel.send({"op": "failed", "message": str(error), "printed": printed.take()})
            return
        check = Check(step, module, folder)
        channel.send({"op": "loaded", "printed": printed.take()})
        while (received := channel.receive()) is not None:
            with limited_cpu(cpu_s):
                if received[0]["op"] == "case":
                    reply = check.run(received[0]["index"])
                elif received[0]["op"] == "find":
                    reply = {"op": "functions", "names": check.suspects()}
                else:
                    reply = {"op": "mistakes", "indices": check.diagnose()}
            channel.send({**reply, "printed": printed.take()})
