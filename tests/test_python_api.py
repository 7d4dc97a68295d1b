"""docs/python-api.md is complete; its samples run and type-check, as do those of README."""

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    EngineConfig,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StructuredOutputs,
)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
WRONG = """from nanovllm import LLM, AsyncLLM, SamplingParams

LLM(dtype="flot32")
AsyncLLM(dtype="flot32")
LLM(gpu_memory_utilization=0.9)
SamplingParams(temprature=0.5)
LLM().generate([1.5])
"""


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def rows() -> dict[str, list[str]]:
    """Return the other cells of all table rows by the name in the first cell."""
    cells: dict[str, list[str]] = {}
    for line in PAGE.splitlines():
        match = re.match(r"\| `(\w+)` \| (.*) \|$", line)
        if match:
            cells.setdefault(match[1], []).append(match[2])
    return cells


def test_the_samples_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "sample"}
    for block in python_blocks(PAGE):
        exec(compile(block, "docs/python-api.md", "exec"), names)
        if "print(" in block:
            assert capsys.readouterr().out.strip(), block
    names["llm"].close()


def test_every_exported_name_is_on_the_page() -> None:
    missing = [
        name for name in nanovllm.__all__ if f"`{name}`" not in PAGE and f"# {name}\n" not in PAGE
    ]
    assert set(missing) <= {"__version__", "AsyncEngine", "EngineConfig"}
    assert "## AsyncEngine and EngineConfig" in PAGE


@pytest.mark.parametrize(
    "kind", [EngineConfig, SamplingParams, BeamSearchParams, StructuredOutputs]
)
def test_every_setting_is_on_the_page_with_its_default(kind: Any) -> None:
    cells = rows()
    for field in fields(kind):
        cell = "|" if field.default is MISSING else f"`{field.default!r}` |"
        assert any(row.startswith(cell) for row in cells[field.name]), field.name


@pytest.mark.parametrize("kind", [RequestOutput, CompletionOutput, RequestMetrics, Logprob])
def test_every_attribute_of_an_output_is_on_the_page(kind: Any) -> None:
    names = getattr(kind, "_fields", None) or [field.name for field in fields(kind)]
    assert set(names) <= rows().keys()


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_every_method_and_argument_is_on_the_page(kind: type) -> None:
    for name, method in vars(kind).items():
        if name.startswith("_"):
            continue
        assert f"`{name}" in PAGE or f"`await {name}" in PAGE or name == "engine", name
        if inspect.isfunction(method):
            for argument in inspect.signature(method).parameters:
                assert argument == "self" or re.search(rf"\b{argument}\b", PAGE), (name, argument)


def test_a_type_checker_accepts_the_samples_and_finds_mistakes(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="make check installs it")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    samples = [block for block in python_blocks(readme) if "openai" not in block]
    assert len(samples) > 2
    for number, sample in enumerate([*samples, "\n".join(python_blocks(PAGE))]):
        (tmp_path / f"sample{number}.py").write_text(sample, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    checked = subprocess.run(
        [*command, "--no-error-summary", "--no-pretty", *map(str, sorted(tmp_path.glob("*.py")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    errors = re.findall(r"(\w+)\.py:(\d+): error", checked.stdout)
    assert errors == [("wrong", str(line)) for line in range(3, 8)], checked.stdout + checked.stderr
