"""Every step passes with its solution, fails with its stub, and names each of its mistakes."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from nanovllm.learn.checking import Mistake
from nanovllm.learn.course import STEPS, Step, is_about
from nanovllm.learn.parts import functions_of, load_step, mistaken, names_of
from nanovllm.learn.stubs import names_to_write, readers_source, stub_names, stub_of
from nanovllm.learn.worker import Check

MISTAKES = [(step, mistake) for step in STEPS for mistake in step.mistakes]


def check(step: Step, module: ModuleType) -> tuple[list[str], list[Mistake]]:
    """Return the state of each case up to the first that fails, and the mistakes."""
    one = Check(step, module, Path())
    states: list[str] = []
    for index in range(len(step.cases)):
        states.append(str(one.run(index)["op"]))
        if states[-1] != "passed":
            break
    return states, [step.mistakes[index] for index in one.diagnose()]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.module)
def test_the_solution_passes(step: Step) -> None:
    states, _ = check(step, step.solution)
    assert states == ["passed"] * len(step.cases)
    assert len(states) >= 5


@pytest.mark.parametrize(
    ("step", "mistake"), MISTAKES, ids=lambda value: getattr(value, "module", None) or value.name
)
def test_a_mistake_is_named(step: Step, mistake: Mistake) -> None:
    states, found = check(step, mistaken(step, mistake))
    assert states[-1] in {"differs", "raised"}
    assert found == [mistake], [one.name for one in found]


def test_there_are_many_mistakes() -> None:
    assert len(MISTAKES) >= 60
    for step in STEPS:
        names = [mistake.name for mistake in step.mistakes]
        assert len(set(names)) == len(names) >= 3, step.module


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.module)
def test_a_stub_has_every_signature_and_no_body(step: Step, tmp_path: Path) -> None:
    stub = stub_of(step)
    assert set(names_to_write(step)) == set(names_of(step.solution)) - given_names(step)
    assert not stub_names(readers_source(step.text("solution.py")))
    assert "nanovllm.learn" not in stub
    (tmp_path / f"{step.module}.py").write_text(stub, encoding="utf-8")
    states, _ = check(step, load_step(tmp_path, step))
    assert states[-1] == "unwritten"


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.module)
def test_a_hint_is_about_functions_of_its_step(step: Step) -> None:
    names = {*functions_of(step, step.solution), *names_to_write(step)}
    subjects = [hint.partition(": ")[0] for hint in step.hints if is_about(hint, names)]
    assert {name.strip("`") for text in subjects for name in text.split(", ")} <= names
    starts = [hint for hint in step.hints if re.match(r"`[\w.]+`[,:]", hint)]
    assert len(starts) == len(subjects)
    for name in names_to_write(step):
        assert any(is_about(hint, [name]) for hint in step.hints) or step.number == 3, name


def given_names(step: Step) -> set[str]:
    """Return the names that a stub has whole."""
    lines = step.text("solution.py").splitlines()
    tree = ast.parse("\n".join(lines))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and lines[node.lineno - 1].endswith("# given")
    }
