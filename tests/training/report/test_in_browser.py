"""Reports in Chromium, opened from the disk without a network."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nanovllm.training.report import read_run, render_report
from tests.support.browser import open_page
from tests.support.training_runs import INFO, metrics, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SAMPLES = [
    {"step": step, "text": f"a <b>text</b> of step {step}", "prompt": "a <b>"} for step in (0, 20)
]
UPDATES = [
    {"step": step, "train_loss": 5.0 - step / 10, "lr": step / 10, "grad_norm": 2.0}
    for step in range(40)
]


def lines(page: "Page", chart: str) -> int:
    """Return the number of lines of the chart with this title."""
    card = page.locator("figure", has=page.get_by_role("heading", name=chart, exact=True))
    return card.locator("svg.chart path.line").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_run_is_shown(browser: "Browser", tmp_path: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    folder = write_run(tmp_path / "small", metrics([0, 20, 40]), SAMPLES, updates=UPDATES)
    path = tmp_path / "report.html"
    path.write_text(render_report([read_run(folder)]), encoding="utf-8")
    with open_page(browser, path.as_uri(), offline=True, color_scheme=scheme) as page:
        page.locator("svg.chart").first.wait_for()
        assert page.locator(".tile dd").first.text_content() == "2.0000"
        assert [lines(page, name) for name in ("Loss", "Learning rate", "Throughput")] == [2, 1, 1]
        assert page.locator("article pre").text_content() == "a <b>text</b> of step 20"
        assert page.locator("mark").last.text_content() == "a <b>"
        assert "nanovllm serve" in (page.locator("dl.commands").text_content() or "")
        plot = page.locator(".plot").first
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert "step 40" in (page.locator(".read-out").text_content() or "")
        page.locator(".segment", has_text="tokens").click()
        assert "over tokens" in (plot.get_attribute("aria-label") or "")
        page.get_by_role("slider", name="sample").fill("0")
        assert page.locator("article h3").text_content() == "Step 0 · validation loss 4.0000"
        page.locator("summary").click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert Axe().run(page).response["violations"] == []


def test_runs_are_compared(browser: "Browser", tmp_path: Path) -> None:
    """Losses of different tokenizers are drawn in bits per byte; a wild learning rate is named."""
    infos = {
        "char": INFO,
        "bpe": {**INFO, "data": {"validation_tokens": 250, "validation_bytes": 1000}},
        "wild": {**INFO, "state": "failed", "message": "the loss is NaN", "config": {"lr": 1e9}},
    }
    runs = [
        read_run(
            write_run(tmp_path / name, metrics([0, 20], lr=1e9 if name == "wild" else 1e-3),
                      SAMPLES, info)
        )
        for name, info in infos.items()
    ]  # fmt: skip
    path = tmp_path / "comparison.html"
    path.write_text(render_report(runs), encoding="utf-8")
    with open_page(browser, path.as_uri(), offline=True) as page:
        page.locator("svg.chart").first.wait_for()
        assert lines(page, "Validation loss") == 3
        assert lines(page, "Learning rate") == 2
        text = page.locator("main").inner_text()
        for part in (
            "bits per byte",
            "the loss is NaN",
            "Not drawn, far above the others: wild (up to 1000000000).",
            "their losses per token cannot be compared",
            "Use the best model, bpe",
        ):
            assert part in text, part
        assert page.locator("table.numbers strong").all_inner_texts() == ["1.082"]
        rows = page.locator("table.texts tbody th").all_inner_texts()
        assert "lr" in rows
        assert "output" not in rows
        assert page.locator("article").count() == 3
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".scroll").first.evaluate("box => box.scrollWidth > box.clientWidth")


def test_a_run_without_values_is_shown(browser: "Browser", tmp_path: Path) -> None:
    folder = write_run(tmp_path / "new", info={**INFO, "state": "running"})
    path = tmp_path / "report.html"
    path.write_text(render_report([read_run(folder)]), encoding="utf-8")
    with open_page(browser, path.as_uri(), offline=True) as page:
        assert page.get_by_text("No values yet.").count() == 4
        assert page.locator(".badge.running").text_content() == "Running"
