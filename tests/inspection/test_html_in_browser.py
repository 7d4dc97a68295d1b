"""Self-contained files in Chromium, opened from the disk without a network."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.inspection.html_file import write_page
from nanovllm.inspection.observe import InspectedModel
from tests.inspection.test_html_file import HOSTILE, pages
from tests.support.browser import open_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_text_of_a_prompt_is_shown_as_text(
    browser: "Browser", model: InspectedModel, tmp_path: Path
) -> None:
    views = {"attention": ".v-map-canvas", "logit-lens": "table", "embeddings": "canvas"}
    for kind, content in pages(model, HOSTILE).items():
        path = tmp_path / f"{kind}.html"
        write_page(content, path)
        with open_page(browser, path.as_uri(), offline=True, color_scheme="dark") as page:
            page.locator(f"main {views[kind]}").first.wait_for()
            # The page and its prompt have the markup's characters, and no element made from them.
            prompt = page.locator(".file-prompt").text_content()
            assert prompt == HOSTILE.replace("\x00", "\ufffd")
            assert page.locator("script").count() == 3
            assert page.locator("img, iframe, object").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert page.locator(".v-row-card").count() == 0, "a file asks no server"
            if kind == "embeddings":
                more = page.get_by_text("nanovllm visualize embeddings").locator("..").inner_text()
                assert "--limit N" in more
                assert "--method tsne" in more
                page.get_by_text("tokens of the vocabulary are shown").wait_for()
