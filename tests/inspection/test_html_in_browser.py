"""Self-contained files in Chromium, opened from the disk without a network."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.inspection.html_file import ablation_page, write_page
from nanovllm.inspection.observe import InspectedModel
from nanovllm.inspection.responses import ablation_entry
from nanovllm.model.ablation import parts_of
from tests.inspection.test_html_file import HOSTILE, pages
from tests.support.browser import open_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_a_file_of_ablations_shows_the_change_of_each_part(
    browser: "Browser", model: InspectedModel, tmp_path: Path
) -> None:
    parts = parts_of(model.config, ["head", "block"])
    losses = {part: 3.0 + 0.1 * index for index, part in enumerate(parts)}
    entry = ablation_entry(model.config, 3.2, losses)
    page_text = ablation_page(HOSTILE, model.config, entry, HOSTILE)
    write_page(page_text, tmp_path / "map.html")
    with open_page(browser, (tmp_path / "map.html").as_uri(), offline=True) as page:
        cells = page.locator(".v-part")
        texts = [f"{loss - 3.2:+.2f}".replace("-", "\u2212") for loss in losses.values()]
        assert cells.all_text_contents() == texts
        rows = page.locator(".v-table tbody tr")
        assert rows.first.locator("td").all_text_contents() == ["1", "block", "3.9000", "+0.7000"]
        page.get_by_role("button", name="Without").click()
        page.get_by_role("button", name="Without").click()
        assert rows.first.locator("td").all_text_contents() == [
            "0", "head 0", "3.0000", "\u22120.2000",
        ]  # fmt: skip
        assert page.locator("img, iframe, object").count() == 0


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
