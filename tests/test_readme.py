"""README.md works when pasted: its Python runs, its commands parse, its results are real."""

import json
import re
import shlex
from pathlib import Path

import pytest

from nanovllm import LLM
from nanovllm.cli.main import build_parser
from tools import comparison_chart

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("examples/README.md", "tests/reference/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "code", [code for language, code in BLOCKS if language == "python" and "openai" not in code]
)
def test_python_blocks_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, so that the kernels load once; test_python_api.py checks the types."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert len(printed.split()) > 5
    if shown := re.search(re.escape(code) + r"```\n\n```text\n(.*?)\n```", README, re.DOTALL):
        assert printed == shown[1]


def test_the_completion_is_the_one_that_is_shown() -> None:
    (body,) = re.findall(r"-d '(.*?)'", README)
    shown = json.loads(next(code for language, code in BLOCKS if language == "json"))
    request = json.loads(body)
    prompt = request.pop("prompt")
    llm = LLM()
    (output,) = llm.generate(prompt, llm.default_sampling_params().clone(**request))
    (choice,) = shown["choices"]
    assert output.outputs[0].text == choice["text"]
    assert output.outputs[0].finish_reason == choice["finish_reason"]
    assert shown["usage"]["prompt_tokens"] == len(output.prompt_token_ids)


def test_the_chart_shows_the_table() -> None:
    page = comparison_chart.PAGE.read_text(encoding="utf-8")
    chart = comparison_chart.draw(comparison_chart.read(page))
    assert comparison_chart.CHART.read_text(encoding="utf-8") == chart


def commands() -> list[str]:
    """Return the commands of README.md and command-line.md without shell syntax."""
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
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors_of(path), link


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_has_at_most_100_columns(page: Path) -> None:
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    prose = code.sub("", page.read_text(encoding="utf-8"))
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []
