"""A hook of mkdocs for links from docs/ to other files of the repository.

On GitHub they are relative. On the site they lead to the repository of `repo_url`, or become plain
text where none is set.
"""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\[\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links that lead out of docs/; mkdocs calls this for each page."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("docs/"):
            return match[0]
        if not config.repo_url:
            return match[1]
        return f"[{match[1]}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return _LINK.sub(rewrite, markdown)
