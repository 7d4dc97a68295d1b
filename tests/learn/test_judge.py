"""Whatever the reader's code does, the judge answers with a clear message."""

from pathlib import Path

import pytest

from nanovllm.learn.course import step_of
from nanovllm.learn.folder import CourseFolder
from nanovllm.learn.judge import Verdict, judge
from nanovllm.learn.stubs import readers_source

STEP = step_of(3)
HEAD = "import numpy as np\n\n\ndef layer_norm(hidden, gain, bias, epsilon):\n"
RIGHT = """    centred = hidden - hidden.mean(axis=1, keepdims=True)
    return gain * centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon) + bias
"""


@pytest.fixture
def folder(tmp_path: Path) -> CourseFolder:
    return CourseFolder.start(tmp_path / "gpt")


def judged(folder: CourseFolder, source: str, cpu_s: float = 5.0) -> Verdict:
    """Return the verdict of step 3 with this file."""
    folder.file(STEP).write_text(source, encoding="utf-8")
    return judge(folder.path, STEP, cpu_s=cpu_s, memory_bytes=256 << 20)


def test_a_readers_own_way_of_writing_it_passes(folder: CourseFolder) -> None:
    verdict = judged(folder, HEAD + RIGHT)
    assert verdict.has_passed
    assert not verdict.mistakes


def test_a_readers_own_mistake_is_named(folder: CourseFolder) -> None:
    verdict = judged(folder, HEAD + RIGHT.replace("axis=1", "axis=0"))
    assert verdict.cases[-1].state == "differs"
    assert [mistake.name for mistake in verdict.mistakes] == ["wrong axis"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("axis=1, keepdims=True", "axis=1", ["no keepdims"]),
        ("hidden - hidden.mean(axis=1, keepdims=True)",
         "hidden.copy()\n    centred -= hidden.mean(axis=1)", ["no keepdims"]),
        ("    return", "    centred @ centred if len(hidden) > 1 else 0\n    return", []),
        ("    return", "    if len(hidden) > 1: raise ValueError('no')\n    return", []),
    ],
)  # fmt: skip
def test_an_exception_is_a_mistake_where_its_message_is_that_of_the_mistake(
    folder: CourseFolder, old: str, new: str, named: list[str]
) -> None:
    verdict = judged(folder, HEAD + RIGHT.replace(old, new))
    assert (len(verdict.cases), verdict.cases[-1].state) == (2, "raised")
    assert verdict.cases[-1].text.startswith("ValueError")
    assert [mistake.name for mistake in verdict.mistakes] == named


@pytest.mark.parametrize(
    ("body", "state", "text"),
    [
        ("    while True:\n        pass\n", "ended", "did not end within 1 s"),
        ("    return np.ones((1 << 36,))\n", "raised", "allocate"),
        ("    return [bytearray(1 << 20) for _ in range(1 << 20)]\n", "raised", "MemoryError"),
        ("    return layer_norm(hidden, gain, bias, epsilon)\n", "raised", "RecursionError"),
        ("    return 1 / 0\n", "raised", "line 5: return 1 / 0"),
        ("    x = hidden.mean()\n", "differs", "no `return` was reached"),
        ("    return 'text'\n", "differs", "a str ('text'), expected an array of shape (1, 3)"),
        ("    return hidden.tolist()\n", "differs", "a list"),
        ("    return hidden[0]\n", "differs", "the shape (3,), expected (1, 3)"),
        (
            "    return hidden * np.nan\n",
            "differs",
            "3 are not a number (NaN), the first at [0, 0]\n  found    [[nan nan nan]]",
        ),
        ("    return hidden * np.nan\n", "differs", "logarithm of a negative number"),
        (
            "    return (hidden - 6) / (hidden - 6)\n",
            "differs",
            "1 is not a number (NaN), the first at [0, 2]",
        ),
        (
            "    return (hidden - 6) / (hidden - 6)\n",
            "differs",
            "the first NaN is from line 5: return (hidden - 6) / (hidden - 6)\n  NaN is 0 / 0",
        ),
        ("    return hidden > 0\n", "differs", "elements of type bool, expected float32"),
        ("    import os\n    os._exit(3)\n", "ended", "ended the process"),
        ("    raise NotImplementedError\n", "unwritten", "a part is not written yet"),
        ("    import sys\n    sys.exit(0)\n", "raised", "SystemExit"),
        ("    raise ValueError(chr(0xD800))\n", "raised", "\\ud800"),
    ],
)
def test_code_that_goes_wrong_gets_a_message(
    folder: CourseFolder, body: str, state: str, text: str
) -> None:
    verdict = judged(folder, HEAD + body, cpu_s=1.0)
    assert verdict.cases[-1].state == state, verdict
    assert text in verdict.cases[-1].text
    assert not verdict.has_passed


@pytest.mark.parametrize(
    ("number", "old", "new", "functions"),
    [
        (1, "    ids = to_bytes(text)\n    for rank", "    ids = []\n    for rank", ("encode",)),
        (2, "logits - logits.max(", "logits * logits.max(", ("softmax",)),
        (2, "    return shifted - ", "    raise NotImplementedError\n    return shifted - ",
         ("log_softmax",)),
        (8, "            self._counts[block] = 1", "            self._counts[block] = 2",
         ("BlockManager.free",)),
        (12, 'compiled."""\n', 'compiled."""\n    rows = rows + rows\n', ("matmul_numba",)),
    ],
)  # fmt: skip
def test_the_functions_that_failed_are_named(
    folder: CourseFolder, number: int, old: str, new: str, functions: tuple[str, ...]
) -> None:
    step = step_of(number)
    source = readers_source(step.text("solution.py"))
    assert old in source
    folder.file(step).write_text(source.replace(old, new), encoding="utf-8")
    verdict = judge(folder.path, step)
    assert verdict.cases[-1].state in {"differs", "raised", "unwritten"}
    assert verdict.functions == functions


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("def layer_norm(:\n", "line 1: invalid syntax"),
        ("import nothing_at_all\n", "line 1: ModuleNotFoundError"),
        ("while True:\n    pass\n", "did not end"),
        ("print(7)", "defines no layer_norm"),
    ],
)
def test_a_file_that_cannot_be_loaded_gets_a_message(
    folder: CourseFolder, source: str, text: str
) -> None:
    verdict = judged(folder, source, cpu_s=0.3)
    assert text in (verdict.problem or verdict.cases[-1].text)
    assert not verdict.has_passed


def test_what_the_code_prints_is_shown_with_its_case(folder: CourseFolder) -> None:
    printing = "    print('shape', hidden.shape)\n    while len(hidden) > 2: print('x' * 1000)\n"
    verdict = judged(folder, HEAD + printing + RIGHT, cpu_s=0.5)
    assert verdict.cases[0].printed == "shape (1, 3)\n"
    assert verdict.cases[-1].state == "ended"
    assert judged(folder, "print('loading')\n").printed == "loading\n"


def test_a_check_does_not_depend_on_another_step(folder: CourseFolder) -> None:
    folder.file(STEP).write_text(HEAD + "    return hidden * 0\n", encoding="utf-8")
    step = step_of(5)
    solution = readers_source(step.text("solution.py"))
    assert "from step03_layer_norm import layer_norm" in solution
    folder.file(step).write_text(solution, encoding="utf-8")
    assert judge(folder.path, step).has_passed
