"""Tutorial: what a script computes of a page, and how it gets into the page.

A generated part of a page stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. Numbers
in the prose are facts: the page must contain each of them, word for word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "tutorials"
IMAGES = ROOT / "docs" / "images"


@dataclass(frozen=True, slots=True)
class Tutorial:
    """The computed contents of a page.

    Attributes:
        page: name of the page in docs/tutorials.
        parts: the generated parts by name, as Markdown.
        facts: pieces of the page's prose.
        pictures: SVG by the name of its file in docs/images.
    """

    page: str
    parts: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[str] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> str:
        """Return the page as it is."""
        return (FOLDER / self.page).read_text(encoding="utf-8")

    def filled(self) -> str:
        """Return the page with its generated parts; raises ValueError if it lacks one."""
        text = self.read()
        for name, part in self.parts.items():
            begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
            before, _, rest = text.partition(begin)
            _, found, after = rest.partition(end)
            if not found:
                raise ValueError(f"{self.page} has no part {name!r}; write {begin}{end} into it")
            text = f"{before}{begin}{part.strip()}\n{end}{after}"
        return text

    def problems(self) -> list[str]:
        """Return what the page and its pictures do not show as it was computed."""
        text = self.read()
        prose = " ".join(text.split())
        found = [f"{self.page} does not say: {fact}" for fact in self.facts if fact not in prose]
        stale = [self.page] if self.filled() != text else []
        for name, svg in self.pictures.items():
            path = IMAGES / name
            if not path.exists() or path.read_text(encoding="utf-8") != svg:
                stale.append(name)
        remedy = "is not up to date; run python tools/make_tutorials.py"
        return [*found, *(f"{name} {remedy}" for name in stale)]

    def write(self) -> None:
        """Write the page's generated parts and its pictures."""
        (FOLDER / self.page).write_text(self.filled(), encoding="utf-8")
        for name, svg in self.pictures.items():
            (IMAGES / name).write_text(svg, encoding="utf-8")


def code(lines: Sequence[str]) -> str:
    """Return lines as a block of code."""
    return "\n".join(["```text", *lines, "```"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
