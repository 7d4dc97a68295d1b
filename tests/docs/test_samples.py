"""The Python samples of the pages run and type-check; docs/reference/python-api.md is complete."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import nanovllm
from nanovllm import LLM, AsyncLLM, CompletionOutput, Logprob, RequestMetrics, RequestOutput

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PYTHON_API = DOCS / "reference" / "python-api.md"
API = PYTHON_API.read_text(encoding="utf-8")
NEEDS_A_SERVER_OR_TORCH = re.compile(r"openai|client\.|transformers")
WRONG = """from nanovllm import LLM, AsyncLLM, SamplingParams

LLM(dtype="flot32")
AsyncLLM(dtype="flot32")
LLM(gpu_memory_utilization=0.9)
SamplingParams(temprature=0.5)
LLM().generate([1.5])
"""


def samples(page: Path) -> list[tuple[str, str]]:
    """Return the Python blocks of a page, each with the output that is shown below it, or ""."""
    text = page.read_text(encoding="utf-8")
    block = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
    return [
        (code, shown)
        for code, shown in block.findall(text)
        if not NEEDS_A_SERVER_OR_TORCH.search(code)
    ]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if samples(page)]


@pytest.mark.slow(15)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_samples_run_one_after_another(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    steps = '{"step": 0, "grad_norm": 2.0}\n{"step": 1, "grad_norm": 1.0}\n'
    (tmp_path / "shakespeare" / "steps.jsonl").write_text(steps, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "sample"}
    for code, shown in samples(page):
        exec(compile(code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        if shown:
            assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()
        elif "print(" in code:
            assert printed.strip(), code
    if isinstance(llm := names.get("llm"), LLM):
        llm.close()


def rows() -> set[str]:
    """Return the names in the first cells of all table rows."""
    return set(re.findall(r"^\| `(\w+)` \|", API, re.MULTILINE))


def test_every_exported_name_is_on_the_page() -> None:
    missing = [
        name for name in nanovllm.__all__ if f"`{name}`" not in API and f"# {name}\n" not in API
    ]
    assert set(missing) <= {"__version__", "AsyncEngine", "EngineConfig"}
    assert "## AsyncEngine and EngineConfig" in API


@pytest.mark.parametrize("kind", [RequestOutput, CompletionOutput, RequestMetrics, Logprob])
def test_every_attribute_of_an_output_is_on_the_page(kind: Any) -> None:
    names = getattr(kind, "_fields", None) or [field.name for field in fields(kind)]
    assert set(names) <= rows()


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_every_method_and_argument_is_on_the_page(kind: type) -> None:
    for name, method in vars(kind).items():
        if name.startswith("_"):
            continue
        assert f"`{name}" in API or f"`await {name}" in API or name == "engine", name
        if inspect.isfunction(method):
            for argument in inspect.signature(method).parameters:
                assert argument == "self" or re.search(rf"\b{argument}\b", API), (name, argument)


def test_a_type_checker_accepts_the_samples_and_finds_mistakes(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="make check installs it")
    readme = [code for code, _ in samples(ROOT / "README.md")]
    pages = ["\n".join(code for code, _ in samples(page)) for page in PAGES]
    for number, code in enumerate([*readme, *pages]):
        (tmp_path / f"sample{number}.py").write_text(code, encoding="utf-8")
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
