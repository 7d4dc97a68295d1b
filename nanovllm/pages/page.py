"""Self-contained HTML pages: style sheets, a script and the data that it shows, in one file.

A page opens from the disk without a network. Its Content-Security-Policy allows the scripts and the
style sheet in it, by their hashes, and nothing else. Text from prompts, vocabularies and samples is
in a block of JSON, without the characters `<`, `>` and `&`, and enters the page as text nodes.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nanovllm.pages.bundle import bundle

ASSETS = Path(__file__).parent / "assets"
# Control characters and lone surrogates: invalid in HTML or impossible to encode.
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render_page(
    *,
    title: str,
    heading: str,
    subtitle: str,
    script: str,
    styles: Sequence[str],
    data: Mapping[str, Any],
    intro: str = "",
    values: Iterable[tuple[str, str]] = (),
    reload_s: int | None = None,
) -> str:
    """Return a page.

    Args:
        title: of the window.
        heading, subtitle: the first lines of the page.
        script: path in `assets` of the ES module that shows the data; see `bundle`.
        styles: paths in `assets` of style sheets, after those of every page.
        data: JSON, which the script reads from the element with the id "data".
        intro: text above the script's elements, such as a prompt.
        values: names and values to show where JavaScript is off.
        reload_s: seconds after which the page reloads itself.
    """
    theme, code, style = _asset("elements/theme.js"), _bundle(script), _style(tuple(styles))
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; "
        f"script-src '{_hash(theme)}' '{_hash(code)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    refresh = f'\n<meta http-equiv="refresh" content="{reload_s}">' if reload_s else ""
    content = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    rows = "".join(
        f"<tr><th>{_escape(name)}</th><td>{_escape(value)}</td></tr>" for name, value in values
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">{refresh}
<link rel="icon" href="data:,">
<title>{_escape(title)}</title>
<style>{style}</style>
<script>{theme}</script>
</head>
<body>
<header class="file-header">
<h1>{_escape(heading)}</h1>
<p class="secondary">{_escape(subtitle)}</p>
<div id="actions"></div>
</header>
<main id="main" class="file-main">
{f'<p class="file-prompt" tabindex="0">{_escape(intro)}</p>' if intro else ""}
<noscript>
<p>The charts and tables of this page need JavaScript.</p>{rows and f"<table>{rows}</table>"}
</noscript>
</main>
<script type="application/json" id="data">{content}</script>
<script>{code}</script>
</body>
</html>
"""


def _escape(text: str) -> str:
    """Return text as HTML; characters that HTML cannot have become U+FFFD."""
    return html.escape(_INVALID.sub("\ufffd", text))


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _style(names: tuple[str, ...]) -> str:
    common = ("elements/style.css", "elements/components.css")
    return "\n".join(map(_asset, (*common, *names, "elements/file.css")))


@cache
def _bundle(entry: str) -> str:
    return bundle(ASSETS, entry)


@cache
def _hash(text: str) -> str:
    """Return the hash of an inline script or style sheet for a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
