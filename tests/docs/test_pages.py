"""Every page of the documentation: its links, commands, targets, pictures and line lengths."""

import re
import shlex
from pathlib import Path

import pytest

from nanovllm.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OTHER_PAGES = (
    "README.md",
    "LEARNING.md",
    "nanovllm/learn/notebooks/README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "examples/README.md",
    "tests/reference/README.md",
)
STEP_PAGES = sorted(ROOT.glob("nanovllm/learn/steps/*/page.md"))
PAGES = [*(ROOT / name for name in OTHER_PAGES), *STEP_PAGES, *sorted(DOCS.rglob("*.md"))]
WRONG_OPTION = "--prot "  # in the example of an error


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Return the `nanovllm` commands of a page, in blocks of shell and after a prompt."""
    code = "".join(blocks(page, "sh")).replace("\\\n", " ")
    code += "".join(re.findall(r"^\$ (nanovllm .*\n)", page.read_text("utf-8"), re.MULTILINE))
    found = re.findall(r"(?:^|[;&|] |nice |[A-Z_]+=\S+ )(nanovllm [a-z].*)", code, re.MULTILINE)
    return [
        re.split(r" [|;] ", line)[0].replace("$threads", "1")
        for line in found
        if WRONG_OPTION not in line and "numactl" not in line
    ]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_parse(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        assert callable(build_parser().parse_args(words).run), line


def test_there_are_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 70


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_and_scripts_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ *|`)make ([a-z-]+)\b", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    if "lab-notebook" not in page.name:  # it tells of programs that are gone
        programs = r"\bpython ((?:benchmarks|tools|scripts|examples)/[\w/]+\.py)"
        for script in re.findall(programs, text):
            assert (ROOT / script).is_file(), script
        for module in re.findall(r"\bpython -m ((?:benchmarks|tests|nanovllm)\.[\w.]+\w)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=relative)
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


def test_every_picture_is_shown() -> None:
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+\.(?:png|svg|webp))\)", page.read_text("utf-8"))
    }
    pictures = set((DOCS / "images").iterdir()) | {
        page.parent / "picture.svg" for page in STEP_PAGES
    }
    assert pictures == shown


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_prose_has_at_most_100_columns(page: Path) -> None:
    code = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
    prose = code.sub("", page.read_text(encoding="utf-8"))
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > 100] == []


def test_no_page_names_a_package_that_is_not_published() -> None:
    for page in PAGES:
        assert not re.search(r"pip install '?nanovllm", page.read_text("utf-8")), page
