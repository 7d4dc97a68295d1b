"""Each page's worked example gives the numbers shown, its links exist, its picture is current."""

import ast
import doctest
import re
from pathlib import Path

import numpy as np
import pytest

from nanovllm.learn.course import STEPS, Step
from nanovllm.learn.parts import load_parts
from tools.course.__main__ import STEPS_FOLDER, picture_of

_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MAX_WORDS = 1130
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=STEPS, ids=lambda step: step.module)
def step(request: pytest.FixtureRequest) -> Step:
    return request.param  # type: ignore[no-any-return]


def test_the_worked_example_gives_the_numbers_shown(step: Step) -> None:
    load_parts(None)
    parser = doctest.DocTestParser()
    example = parser.get_doctest(
        step.text("page.md").replace("```\n", "\n"), {"np": np}, step.module, "page.md", 0
    )
    assert len(example.examples) >= 2, "a page has a worked example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with np.printoptions(precision=3, suppress=True):
        assert runner.run(example).failed == 0


def test_links_name_what_exists(step: Step) -> None:
    path = STEPS_FOLDER / step.module / "page.md"
    assert symbols_of(path), "a page says where the engine does the same"


def test_links_of_the_door_name_what_exists() -> None:
    assert len(symbols_of(ROOT / "LEARNING.md")) > 10


def test_the_door_has_the_minutes_of_each_step() -> None:
    text = (ROOT / "LEARNING.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| \[(\d+)\]\(.*\| (\d+) \|[^|]*\|$", text)
    assert rows == [(str(step.number), str(step.minutes)) for step in STEPS]
    assert all(20 <= step.minutes <= 90 for step in STEPS)
    assert f"about {sum(step.minutes for step in STEPS) / 60:.0f} hours" in text


def symbols_of(page: Path) -> list[str]:
    """Return the symbols that a page links to; each must be defined in the file of its link."""
    symbols = []
    for name, target in _LINK.findall(page.read_text(encoding="utf-8")):
        if target.endswith(".py") and name.startswith("`"):
            symbols.append(name.strip("`").partition(".")[0])
            assert symbols[-1] in names_in(page.parent / target), (name, target)
    return symbols


def test_the_engine_has_what_a_step_names(step: Step) -> None:
    for real in step.real:
        module, name = real.split(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert name in names_in(path), real


def names_in(path: Path) -> set[str]:
    """Return the names that a file defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_a_page_has_its_parts(step: Step) -> None:
    page = step.text("page.md")
    assert page.startswith(f"# Step {step.number}: ")
    assert page.count("<details>") == page.count("</details>") >= 3, "three questions with answers"
    assert f"nanovllm learn check {step.number}" in page
    assert "](picture.svg)" in page
    assert 300 <= len(_CODE.sub("", page).split()) <= _MAX_WORDS
    assert max(map(len, page.splitlines())) <= 100
    assert 3 <= len(step.hints) <= 7


def test_the_picture_is_current(step: Step) -> None:
    path = STEPS_FOLDER / step.module / "picture.svg"
    assert path.read_text(encoding="utf-8") == picture_of(step), "run python -m tools.course"
