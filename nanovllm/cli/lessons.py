"""The commands of `nanovllm learn`."""

import argparse
import difflib
import os
import re
import sys
import textwrap
from importlib.resources import files

from nanovllm.errors import InvalidRequestError
from nanovllm.learn.course import STEPS, Step, step_of
from nanovllm.learn.folder import CourseFolder
from nanovllm.learn.judge import CaseResult, Verdict, judge
from nanovllm.learn.stubs import readers_source

_WIDTH = 96
_MAX_PRINTED = 20  # lines of a case
_DETAILS = re.compile(r"<details><summary>(.*?)</summary>(.*?)</details>", re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^):\s]+)\)")
_START = "`nanovllm learn start my-gpt` makes a folder to write in"


def run_list(parsed: argparse.Namespace) -> int:
    """List the steps, with progress where there is a folder."""
    folder = _find(parsed)
    for step in STEPS:
        status = "" if folder is None else folder.status(step)
        print(f"{step.number:3}  {step.title:58}{step.minutes:3} min  {status}".rstrip())
    print()
    if folder is None:
        print(_START + ".")
        return 0
    open_steps = [step for step in STEPS if folder.status(step) != "passed"]
    print(f"{len(STEPS) - len(open_steps)} of {len(STEPS)} steps passed.", end=" ")
    if open_steps:
        print(f"Next: nanovllm learn show {open_steps[0].number}")
    else:
        print("Serve your GPT: nanovllm serve --backend learn:.")
    return 0


def run_start(parsed: argparse.Namespace) -> int:
    """Make a reader's folder."""
    CourseFolder.start(parsed.dir, has_solutions=parsed.solutions)
    print(f"Wrote {len(STEPS)} files to {parsed.dir}. Go on with:")
    print(f"  cd {parsed.dir}\n  nanovllm learn show 1\n  nanovllm learn check 1")
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Print a step's page or solution."""
    step = step_of(parsed.step)
    if parsed.solution:
        print(readers_source(step.text("solution.py")), end="")
    else:
        print(page_as_text(step), end="")
    return 0


def run_check(parsed: argparse.Namespace) -> int:
    """Judge steps, or all that are written; the exit code is 1 if one does not pass."""
    folder = require_folder(parsed)
    steps = [step_of(number) for number in parsed.steps]
    if not steps:
        unwritten = {"not written", "no file"}
        steps = [step for step in STEPS if folder.status(step) not in unwritten]
    if not steps:
        print("Nothing is written yet. Begin with: nanovllm learn show 1")
    return max((_check(folder, step) for step in steps), default=0)


def run_hint(parsed: argparse.Namespace) -> int:
    """Print the next hint, or those that were shown."""
    step = step_of(parsed.step)
    folder = require_folder(parsed)
    if parsed.all:
        shown = [step.hints[index] for index in folder.hints.get(step.number, [])]
        print("\n\n".join(shown) or "No hint of this step was shown yet.")
        return 0
    number, count, text = folder.next_hint(step)
    print(f"Hint {number} of {count} for step {step.number}:\n\n{text}")
    if number == count:
        print(
            f"\nThat was the last one. The solution: nanovllm learn show {step.number} --solution"
        )
    return 0


def run_diff(parsed: argparse.Namespace) -> int:
    """Print the reader's code of a step beside the solution, and where the engine does the same."""
    folder, step = require_folder(parsed), step_of(parsed.step)
    if folder.status(step) == "not written":
        raise InvalidRequestError(
            f"step {step.number} is not written yet; `nanovllm learn show {step.number} "
            "--solution` prints the solution"
        )
    file = folder.file(step)
    try:
        yours = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{file} cannot be read: {error}") from None
    solution = readers_source(step.text("solution.py")).splitlines(keepends=True)
    lines = difflib.unified_diff(yours, solution, file.name, "the solution")
    sys.stdout.writelines(lines)
    print("\nThe engine's own code of this step:")
    for name in step.real:
        print(f"  {name.replace(':', '.')}")
    return 0


def page_as_text(step: Step) -> str:
    """Return a step's page for a terminal: full paths, and the answers behind the questions."""
    folder = files("nanovllm.learn.steps") / step.module
    answers: list[str] = []

    def fold(match: re.Match[str]) -> str:
        answers.append(f"{len(answers) + 1}. {match[2].strip()}")
        return f"{len(answers)}. {' '.join(match[1].split())}"

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(str(folder), match[3]))  # noqa: PTH118 - of a resource
        return f"The picture: {path}" if match[1] else f"{match[2]} ({os.path.relpath(path)})"

    text = _DETAILS.sub(fold, step.text("page.md"))
    text = _LINK.sub(link, re.sub(r"\n{3,}", "\n\n", text))
    return f"{text.rstrip()}\n\n## Answers\n\n" + "\n\n".join(answers) + "\n"


def _find(parsed: argparse.Namespace) -> CourseFolder | None:
    return CourseFolder.find(getattr(parsed, "folder", None))


def require_folder(parsed: argparse.Namespace) -> CourseFolder:
    """Return the reader's folder; raises InvalidRequestError if there is none."""
    folder = _find(parsed)
    if folder is None:
        raise InvalidRequestError(
            f"there is no reader's folder here; {_START}, --folder DIR names one"
        )
    return folder


def _check(folder: CourseFolder, step: Step) -> int:
    """Judge a step and print the result. Return the exit code."""
    file = folder.file(step)
    if not file.exists():
        raise InvalidRequestError(
            f"there is no {file}; `nanovllm learn start` writes all files to a new folder"
        )
    print(f"Step {step.number}: {step.title}   {os.path.relpath(file)}")
    verdict = judge(folder.path, step, _print_case)
    folder.note_check(step, has_passed=verdict.has_passed, functions=verdict.functions)
    if verdict.has_passed:
        print(f"Passed. Compare: nanovllm learn diff {step.number}\n")
        return 0
    _print_verdict(verdict, step)
    return 1


def _print_case(result: CaseResult) -> None:
    labels = {"passed": "ok", "unwritten": "open", "differs": "WRONG", "raised": "ERROR"}
    print(f"  {labels.get(result.state, 'ENDED'):6} {result.case.name}")
    for line in result.text.splitlines():
        print(_wrapped(line, "         "))
    _print_printed(result.printed)


def _print_printed(text: str) -> None:
    """Print what the reader's code printed, cut at 20 lines."""
    lines = text.splitlines()
    for line in lines[:_MAX_PRINTED]:
        print(f"         printed: {line[:_WIDTH]}")
    if len(lines) > _MAX_PRINTED:
        print(f"         and more lines, the first {len(text):,} characters of which were kept")


def _print_verdict(verdict: Verdict, step: Step) -> None:
    _print_printed(verdict.printed)
    if verdict.problem:
        print(_wrapped(verdict.problem, "  "))
    for mistake in verdict.mistakes[:2]:
        print(_wrapped(f"Probably: {mistake.text}", "         "))
    last = verdict.cases[-1] if verdict.cases else None
    if last is not None and last.state != "unwritten" and last.case.lesson:
        print(_wrapped(last.case.lesson, "         "))
    passed = sum(result.state == "passed" for result in verdict.cases)
    rest = verdict.num_cases - len(verdict.cases)
    stopped = f"; {rest} were not run" if rest and verdict.cases else ""
    hint = f"nanovllm learn hint {step.number}"
    print(f"{passed} of {verdict.num_cases} pass{stopped}. A hint: {hint}\n")


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
