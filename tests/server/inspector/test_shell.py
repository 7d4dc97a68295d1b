"""The page's frame in Chromium: tabs, theme, the key dialog, and axe's checks of every tab."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import open_page
from tests.support.serving import RunningServer, loader

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TABS = ["Playground", "Chat", "Engine", "Attention", "Logit lens", "Embeddings"]
KEY = "a secret key"
VIOLATIONS = {"resultTypes": ["violations"]}
CONTRAST = {**VIOLATIONS, "runOnly": ["color-contrast"]}


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    with RunningServer(loader(tiny_model), api_keys=[KEY]) as running:
        yield running


def wait_for_model(page: "Page") -> None:
    page.locator(".dot.ready").wait_for()
    page.locator(".status-model", has_text="tiny").wait_for()


def test_the_tabs_follow_the_keyboard_and_the_address(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, f"{server.url}/#attention") as page:
        selected = page.locator('[role="tab"][aria-selected="true"]')
        assert selected.text_content() == "Attention"
        assert page.get_by_role("tab").all_text_contents() == TABS
        selected.focus()
        page.keyboard.press("ArrowRight")
        page.locator("#panel-lens:visible").wait_for()
        page.keyboard.press("Home")
        page.locator("#panel-playground:visible").wait_for()
        assert page.evaluate("location.hash") == "#playground"
        assert page.locator("[role=tabpanel]:visible").count() == 1
        page.go_back()
        page.locator("#panel-lens:visible").wait_for()
        assert page.title().startswith("Logit lens")


def test_the_tour_is_offered_once_and_leads_through_the_views(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        offer = page.get_by_role("button", name="Take the tour: 5 steps")
        offer.focus()
        page.keyboard.press("Enter")
        tour = page.get_by_role("dialog")
        views = ["Playground", "Playground", "Playground", "Engine", "Attention"]
        for number, view in enumerate(views, 1):
            heading = tour.get_by_role("heading", name=f"{number} of 5")
            heading.wait_for()
            assert heading.evaluate("element => element === document.activeElement")
            page.locator(f'[role="tab"][aria-selected="true"]:text-is("{view}")').wait_for()
            page.locator("[role=tabpanel]:visible .tour-target").wait_for()
            for _ in range(3):
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement.textContent") in ("Next", "Finish"):
                    break
            page.keyboard.press("Enter")
        tour.wait_for(state="detached")
        assert page.locator(".tour-target").count() == 0
        page.reload()
        page.get_by_role("tab", name="Playground").click()
        page.get_by_text("No tokens yet").wait_for()
        assert offer.count() == 0
        again = page.get_by_role("button", name="Take the tour")
        again.click()
        page.get_by_role("heading", name="1 of 5").wait_for()
        page.keyboard.press("Escape")
        assert tour.count() == 0
        assert again.evaluate("element => element === document.activeElement")


def test_the_theme_is_the_systems_until_the_reader_chooses(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url, color_scheme="dark") as page:
        theme = "document.documentElement.dataset.theme"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate(theme) == "dark"
        page.get_by_role("button", name="Use the light theme").click()
        assert page.evaluate(theme) == "light"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.reload()
        assert page.evaluate(theme) == "light"


def test_a_key_is_asked_for_and_kept_in_memory_only(
    browser: "Browser", guarded: RunningServer
) -> None:
    with open_page(browser, guarded.url, expected_errors=2) as page:
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Key").fill("a wrong key")
        page.keyboard.press("Enter")
        dialog.get_by_text("does not accept this key").wait_for()
        dialog.get_by_label("Key").fill(KEY)
        dialog.get_by_role("button", name="Use the key").click()
        wait_for_model(page)
        page.locator(".prompt-input").fill("the")
        page.get_by_role("button", name="Generate").click()
        page.locator(".choice .token").first.wait_for()
        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        page.evaluate("dispatchEvent(new Event('pagehide'))")  # which stores the form and the runs
        assert "the" in page.evaluate(stored)
        assert KEY not in page.evaluate(stored)
        assert KEY not in page.content()


def test_a_declined_key_is_asked_for_again_only_by_the_reader(
    browser: "Browser", guarded: RunningServer
) -> None:
    with open_page(browser, guarded.url, expected_errors=1) as page:
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        page.locator(".status-text", has_text="needs a key").wait_for()
        button = page.get_by_role("button", name="Enter an API key")
        button.click()
        page.get_by_role("dialog").get_by_label("Key").fill(KEY)
        page.keyboard.press("Enter")
        wait_for_model(page)
        page.get_by_role("button", name="Forget the API key").click()
        button.wait_for()


def test_axe_finds_no_serious_fault_in_any_tab(browser: "Browser", server: RunningServer) -> None:
    """By all rules in the light theme; the dark one differs in colours only."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    with open_page(browser, server.url, color_scheme="light") as page:
        page.locator(".prompt-input").fill("the end")
        page.locator("[name=max_tokens]").fill("12")
        page.get_by_role("button", name="Generate").click()
        page.locator(".choice:not(.running) .figures:not([hidden])").wait_for()
        faults = {}
        for tab in TABS:
            page.get_by_role("tab", name=tab).click()
            page.locator("[role=tabpanel]:visible > *").first.wait_for()
            faults[tab] = serious(axe.run(page, options=VIOLATIONS).response)
        page.get_by_role("button", name="Use the dark theme").click()
        for tab in TABS:
            page.get_by_role("tab", name=tab).click()
            page.locator("[role=tabpanel]:visible > *").first.wait_for()
            faults[tab] += serious(axe.run(page, options=CONTRAST).response)
        assert faults == {tab: [] for tab in TABS}


def serious(response: dict[str, Any]) -> list[str]:
    return [
        f"{fault['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for fault in response["violations"]
        if fault["impact"] in {"serious", "critical"}
        for node in fault["nodes"]
    ]


def test_a_narrow_screen_needs_no_sideways_scrolling(
    browser: "Browser", server: RunningServer
) -> None:
    size = {"width": 390, "height": 800}
    with open_page(browser, server.url, viewport=size) as page:
        for tab in TABS:
            page.get_by_role("tab", name=tab).click()
            page.locator("[role=tabpanel]:visible > *").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
            box = page.get_by_role("tab", name=tab).bounding_box()
            assert box is not None
            assert box["x"] >= 0, tab
            assert box["x"] + box["width"] <= 390, tab
        names = "[...document.querySelectorAll('.v-lens th:first-child')]"
        page.get_by_role("tab", name="Logit lens").click()
        page.locator(".v-lens").wait_for()
        assert page.evaluate(f"{names}.every(name => name.scrollWidth <= name.clientWidth)")

        page.set_viewport_size({"width": 280, "height": 800})
        for tab, edge, other in (("Embeddings", "before", "after"), (TABS[0], "after", "before")):
            page.get_by_role("tab", name=tab).click()
            page.locator(f".tabs.more-{edge}:not(.more-{other})").wait_for()
