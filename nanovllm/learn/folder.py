"""The reader's folder: a file a step, and course.json with what passed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidRequestError, counted
from nanovllm.learn.course import STEPS, Step, is_about
from nanovllm.learn.stubs import names_to_write, readers_source, stub_names, stub_of

_MARKER = "course.json"
_README = """# My GPT

One file a step. Fill the functions that raise NotImplementedError, in any order:

    nanovllm learn                what is written, and what passed
    nanovllm learn show 3         the page of step 3
    nanovllm learn check 3        judge step 3
    nanovllm learn hint 3         the next hint; --all for those shown before
    nanovllm learn diff 3         beside the project's code
    nanovllm serve --backend learn:.

In a check and in the server, a part that is not written yet is the project's.

To try the examples of the pages in Python, begin with:

    import numpy as np; np.set_printoptions(precision=3, suppress=True)

They run your files. This fills in a step that they need and you skip:

    nanovllm learn show 4 --solution > step04_attention.py
"""


@dataclass
class CourseFolder:
    """A reader's folder.

    Attributes:
        path: the folder.
        passed: hash of the file of each step that passed, by the step's number.
        hints: indices of the hints that were shown, by the step's number.
        failed: functions that are probably at fault in the last check, by the step's number.
    """

    path: Path
    passed: dict[int, str]
    hints: dict[int, list[int]]
    failed: dict[int, list[str]]

    @classmethod
    def start(cls, path: Path, *, has_solutions: bool = False) -> "CourseFolder":
        """Write the files of all steps. Raises InvalidRequestError where one of them exists."""
        names = [*(f"{step.module}.py" for step in STEPS), _MARKER]
        present = [name for name in names if (path / name).exists()]
        if present:
            raise InvalidRequestError(
                f"{path} has a {present[0]} already, which would be overwritten; name another "
                "folder, or go on with `nanovllm learn` there"
            )
        sources = {
            f"{step.module}.py": (
                readers_source(step.text("solution.py")) if has_solutions else stub_of(step)
            )
            for step in STEPS
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequestError(
                f"the folder {path} cannot be made: {error.strerror}; name another one"
            ) from None
        for name, source in sources.items():
            (path / name).write_text(source, encoding="utf-8")
        if not (path / "README.md").exists():
            (path / "README.md").write_text(_README, encoding="utf-8")
        folder = cls(path, {}, {}, {})
        folder.save()
        return folder

    @classmethod
    def find(cls, path: Path | None) -> "CourseFolder | None":
        """Return the folder at `path`; for None that of the current folder or one above it."""
        if path is not None and not (path / _MARKER).exists():
            raise InvalidRequestError(
                f"{path} has no {_MARKER}; `nanovllm learn start {path}` makes a reader's folder"
            )
        here = Path.cwd()
        places = [path] if path is not None else [here, *here.parents]
        for place in places:
            if (place / _MARKER).exists():
                return cls(place, *_read(place / _MARKER))
        return None

    def save(self) -> None:
        """Write course.json."""
        state = {
            "version": 1, "passed": self.passed, "hints": self.hints, "failed": self.failed,
        }  # fmt: skip
        text = json.dumps(state, indent=2) + "\n"
        (self.path / _MARKER).write_text(text, encoding="utf-8")

    def file(self, step: Step) -> Path:
        """Return the reader's file of a step."""
        return self.path / f"{step.module}.py"

    def status(self, step: Step) -> str:
        """Return how far a step is, in a few words."""
        try:
            source = self.file(step).read_text(encoding="utf-8")
            unwritten = [name for name in names_to_write(step) if name in stub_names(source)]
        except OSError:
            return "no file"
        except (SyntaxError, ValueError):
            return "cannot be read as Python"
        if self.passed.get(step.number) == _hash(source):
            return "passed"
        count = len(names_to_write(step))
        if len(unwritten) == count:
            return "not written"
        if unwritten:
            return f"{count - len(unwritten)} of {counted(count, 'part')} written"
        return "changed since it passed" if step.number in self.passed else "written, not checked"

    def note_check(self, step: Step, *, has_passed: bool, functions: Iterable[str] = ()) -> None:
        """Note the result of a check, and the functions that are probably at fault."""
        self.passed.pop(step.number, None)
        self.failed[step.number] = list(functions)
        if has_passed:
            self.passed[step.number] = _hash(self.file(step).read_text(encoding="utf-8"))
        self.save()

    def next_hint(self, step: Step) -> tuple[int, int, str]:
        """Return the number of the next hint, that of all hints, and its text.

        Hints about the functions in `failed` come first. When all were shown, it is the last one
        again.
        """
        shown, functions = self.hints.setdefault(step.number, []), self.failed.get(step.number, ())
        left = [index for index in range(len(step.hints)) if index not in shown]
        left.sort(key=lambda index: not is_about(step.hints[index], functions))
        shown += left[:1]
        self.save()
        return len(shown), len(step.hints), step.hints[shown[-1]]


def _hash(source: str) -> str:
    return sha256(source.encode()).hexdigest()


def _read(path: Path) -> tuple[dict[int, str], dict[int, list[int]], dict[int, list[str]]]:
    """Return what passed, which hints were shown, and what failed."""
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
        passed = {int(number): str(digest) for number, digest in state["passed"].items()}
        hints = {int(number): [*map(int, shown)] for number, shown in state["hints"].items()}
        failed = {int(number): [*map(str, names)] for number, names in state["failed"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidRequestError(
            f"{path} cannot be read; delete it and run `nanovllm learn start` in a new folder, "
            "then copy your files there"
        ) from None
    return passed, hints, failed
