"""Self-contained pages: their policy, and text that looks like HTML."""

import base64
import hashlib
import re

import pytest

from nanovllm.pages import ASSETS, render_page
from tests.support.html_page import HtmlPage

HOSTILE = "</pre><script>alert(1)</script><!-- <img src=x onerror=alert(2)>\"'&\0\x1b\u2028\ud800"


@pytest.mark.parametrize("script", ["report/report.js", "inspection/file.js"])
def test_a_page_loads_nothing_and_allows_only_its_own_scripts(script: str) -> None:
    styles = sorted(path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*.css"))
    text = render_page(
        title=HOSTILE,
        heading=HOSTILE,
        subtitle=HOSTILE,
        script=script,
        styles=styles,
        data={HOSTILE: HOSTILE},
        intro=HOSTILE,
        values=[(HOSTILE, HOSTILE)],
    )
    page = HtmlPage(text)
    text.encode("utf-8")
    assert len(page.all("script")) == 3
    assert not {"img", "iframe", "object", "pre"} & {tag for tag, _ in page.elements}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not names & {"src", "style", "action", "srcset"}
    assert not [name for name in names if name.startswith("on")]
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not re.search(r"@import|url\(", "".join(page.texts["style"]))
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    shown = re.sub("[\0\x1b\ud800]", "\ufffd", HOSTILE)
    for tag in ("title", "h1", "th", "td"):
        assert page.texts[tag] == [shown]
    assert page.texts["p"][:2] == [shown, shown]
    assert page.data == {HOSTILE: HOSTILE}
    theme, _, code = page.texts["script"]
    hashes = [
        "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for content in (theme, code, *page.texts["style"])
    ]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""
    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "script-src": f"'{hashes[0]}' '{hashes[1]}'",
        "style-src": f"'{hashes[2]}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
