"""Run the check of a step on the reader's folder, in a process with limits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.engine.sandbox.process import START_S, WorkerEndedError, WorkerProcess
from nanovllm.errors import EngineFaultError
from nanovllm.learn.checking import Case, Mistake
from nanovllm.learn.course import Step
from nanovllm.learn.worker import CPU_S, MEMORY_BYTES

_WALL_S = 3 * CPU_S
"""Time after which a case is ended: one that waits uses no processor time."""
_ENDS = {
    "time": f"it did not end within {CPU_S:g} s; is there a loop that does not stop?",
    "memory": f"it needed more than {MEMORY_BYTES >> 30} GiB of memory",
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
    """

    cases: tuple[CaseResult, ...]
    num_cases: int
    problem: str = ""
    mistakes: tuple[Mistake, ...] = ()

    @property
    def has_passed(self) -> bool:
        """Whether all cases passed."""
        passed = sum(result.state == "passed" for result in self.cases)
        return not self.problem and passed == self.num_cases


def judge(
    folder: Path, step: Step, on_case: Callable[[CaseResult], None] = lambda result: None
) -> Verdict:
    """Check a step and call `on_case` after each case. Raises EngineFaultError without a process.

    A step's check uses the reader's code of the steps before it, where it is written.
    """
    cases = step.cases
    try:
        process = WorkerProcess("nanovllm.learn.worker")
    except OSError as error:
        raise EngineFaultError(f"the process of the check cannot start: {error}") from error
    results: list[CaseResult] = []
    try:
        load = {"op": "load", "folder": str(folder.resolve()), "step": step.number}
        reply = _call(process, load, START_S + _WALL_S)
        if reply["op"] != "loaded":
            return Verdict((), len(cases), _problem(step, reply))
        for index, case in enumerate(cases):
            reply = _call(process, {"op": "case", "index": index}, _WALL_S)
            printed = str(reply.get("printed", ""))
            results.append(CaseResult(case, reply["op"], str(reply.get("text", "")), printed))
            on_case(results[-1])
            if reply["op"] != "passed":
                break
        mistakes: tuple[Mistake, ...] = ()
        if results and results[-1].state in {"differs", "raised"}:
            found = _call(process, {"op": "diagnose"}, _WALL_S).get("indices", ())
            mistakes = tuple(step.mistakes[index] for index in found)
        return Verdict(tuple(results), len(cases), mistakes=mistakes)
    finally:
        process.end()


def _call(process: WorkerProcess, header: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Return the reply of the process; op is "ended" where it has ended."""
    try:
        return process.call(header, timeout_s=timeout_s)[0]
    except WorkerEndedError as error:
        return {"op": "ended", "text": _ENDS.get(error.limit, _ENDS[None])}


def _problem(step: Step, reply: dict[str, Any]) -> str:
    if reply["op"] == "failed":
        return str(reply["message"])
    return f"{step.module}.py cannot be loaded: {reply['text']}"
