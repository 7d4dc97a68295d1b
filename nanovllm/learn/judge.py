"""Run the check of a step on the reader's folder, in a process with limits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.engine.sandbox.process import START_S, WorkerEndedError, WorkerProcess
from nanovllm.errors import EngineFaultError
from nanovllm.learn.checking import Case, Mistake
from nanovllm.learn.course import Step
from nanovllm.learn.worker import CPU_S, MEMORY_BYTES

_WALL_S_PER_CPU_S = 3.0
"""Elapsed time after which a case is ended: one that waits uses no processor time."""
_ENDS = {
    "time": "it did not end within {cpu_s:g} s; is there a loop that does not stop?",
    "memory": "it needed too much memory",
    "stack": "it called itself too often",
    None: "it ended the process",
}


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of a case.

    Attributes:
        case: the case.
        state: "passed", "differs", "raised", "unwritten" or "ended".
        text: what differs, what was raised, or why it was ended.
        printed: what the reader's code printed, cut at 4,000 characters.
    """

    case: Case
    state: str
    text: str = ""
    printed: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check.

    Attributes:
        cases: those that ran; the check ends at the first that did not pass.
        num_cases: those of the step.
        problem: why the reader's file could not be loaded; empty if it was.
        mistakes: what the reader's code probably does, the likeliest first.
        functions: where the fault probably is: of the functions that the failed case calls, those
            that the cases reached last.
        printed: what it printed when it was loaded.
    """

    cases: tuple[CaseResult, ...]
    num_cases: int
    problem: str = ""
    mistakes: tuple[Mistake, ...] = ()
    functions: tuple[str, ...] = ()
    printed: str = ""

    @property
    def has_passed(self) -> bool:
        """Whether all cases passed."""
        passed = sum(result.state == "passed" for result in self.cases)
        return not self.problem and passed == self.num_cases


def judge(
    folder: Path,
    step: Step,
    on_case: Callable[[CaseResult], None] = lambda result: None,
    *,
    cpu_s: float = CPU_S,
    memory_bytes: int = MEMORY_BYTES,
) -> Verdict:
    """Check a step. Where it uses earlier ones, it uses the reader's code of what is written.

    Args:
        folder: the reader's folder.
        step: what to check.
        on_case: called after each case.
        cpu_s: processor time of loading the files, and of each case.
        memory_bytes: memory that the process may have beside its libraries.

    Raises EngineFaultError if the process of the check cannot start.
    """
    cases = step.cases
    try:
        process = WorkerProcess("nanovllm.learn.worker")
    except OSError as error:
        raise EngineFaultError(f"the process of the check cannot start: {error}") from error
    ask = functools.partial(_call, process, cpu_s)
    results: list[CaseResult] = []
    try:
        reply = ask(
            op="load",
            folder=str(folder.resolve()),
            step=step.number,
            cpu_s=cpu_s,
            memory_bytes=memory_bytes,
        )
        loading = str(reply.get("printed", ""))
        if reply["op"] != "loaded":
            return Verdict((), len(cases), _problem(step, reply), printed=loading)
        for index, case in enumerate(cases):
            reply = ask(op="case", index=index)
            printed = str(reply.get("printed", ""))
            results.append(CaseResult(case, reply["op"], str(reply.get("text", "")), printed))
            on_case(results[-1])
            if reply["op"] != "passed":
                break
        mistakes: tuple[Mistake, ...] = ()
        if results and results[-1].state in {"differs", "raised"}:
            mistakes = tuple(step.mistakes[at] for at in ask(op="diagnose").get("indices", ()))
        functions: tuple[str, ...] = ()
        if results and results[-1].state in {"differs", "raised", "unwritten"}:
            functions = tuple(ask(op="find").get("names", ()))
        return Verdict(
            tuple(results), len(cases), mistakes=mistakes, functions=functions, printed=loading
        )
    finally:
        process.end()


def _call(process: WorkerProcess, limit_s: float, **header: Any) -> dict[str, Any]:
    """Return the reply of the process; op is "ended" where it has ended."""
    start_s = START_S if header["op"] == "load" else 0.0
    try:
        reply, _ = process.call(header, timeout_s=start_s + _WALL_S_PER_CPU_S * limit_s)
        return {name: _encodable(value) for name, value in reply.items()}
    except WorkerEndedError as error:
        text = _ENDS.get(error.limit, _ENDS[None])
        return {"op": "ended", "text": text.format(cpu_s=limit_s)}


def _encodable(value: Any) -> Any:
    """Return a text that a terminal can show: half a surrogate pair cannot be encoded."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _problem(step: Step, reply: dict[str, Any]) -> str:
    if reply["op"] == "failed":
        return str(reply["message"])
    return f"{step.module}.py cannot be loaded: {reply['text']}"
