"""A hook of mkdocs: the course on the site, and links between its parts, docs/ and the code.

LEARNING.md and the pages of the steps are in other folders of the repository; on the site they are
below learn/. On GitHub links are relative. On the site, those to files that are not on it lead to
the repository of `repo_url`, or become plain text where none is set.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
_STEPS = "nanovllm/learn/steps"
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Add the course's pages and pictures; mkdocs calls this once."""
    sources = [ROOT / "LEARNING.md"]
    for step in sorted((ROOT / _STEPS).glob("step*")):
        sources += [path for path in sorted(step.iterdir()) if path.suffix in {".svg", ".md"}]
    for source in sources:
        if source.name != "hints.md":
            uri = _to_site(source.relative_to(ROOT).as_posix())
            files.append(File.generated(config, uri, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any, **_: Any) -> str:
    """Rewrite the relative links of a page, and render what is folded; mkdocs calls this."""
    here = _to_repository(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = _to_site(path)
        if files.get_file_from_path(uri) is not None:
            relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
            return f"{mark}[{text}]({relative}{anchor})"
        if not config.repo_url:
            return text
        return f"{mark}[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return _LINK.sub(rewrite, markdown.replace("<details>", '<details markdown="1">'))


def _to_site(path: str) -> str:
    """Return the place on the site of a file of the repository; one above it is not on the site."""
    if path == "LEARNING.md":
        return "learn/README.md"
    if path.startswith(f"{_STEPS}/"):
        return f"learn{path.removeprefix(_STEPS)}"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"


def _to_repository(uri: str) -> str:
    """Return the file of the repository behind a page of the site."""
    if uri == "learn/README.md":
        return "LEARNING.md"
    return f"{_STEPS}{uri.removeprefix('learn')}" if uri.startswith("learn/") else f"docs/{uri}"
