"""The README is what a visitor pastes from: its Python runs, its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from nanovllm.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "code", [code for language, code in BLOCKS if language == "python" and "openai" not in code]
)
def test_python_blocks_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, so that Python and the kernels are loaded once; tests/test_python_api.py checks their types."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.split()) > 10


def commands() -> list[str]:
    """The commands of README.md and of the page about them, those with a shell's own syntax left out."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    lines = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
    lines += re.findall(r"^(?:\$ )?(nanovllm [a-z].*)", page, re.MULTILINE)
    return [line for line in lines if line.startswith("nanovllm ") and "--prot" not in line]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    assert callable(build_parser().parse_args(shlex.split(line, comments=True)[1:]).run)


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert targets >= {"serve", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in set(re.findall(r"scripts/\w+\.py", README)):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
