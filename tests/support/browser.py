"""A page of the inspector in headless Chromium, and the checks that hold for every page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.support.requirements import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

TIMEOUT_MS = 120_000
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OWN_SCHEMES = {"data", "blob"}


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Start the system's Chromium; where it or playwright is missing, skip, or fail in CI.

    Playwright's synchronous interface keeps an event loop in this thread until it is closed, so
    `asyncio.run` cannot be called meanwhile.
    """
    if find_spec("playwright") is None or find_spec("axe_playwright_python") is None:
        missing("the extra `browser` is not installed")
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        missing("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as started:
        arguments = ["--no-sandbox"] if is_root else []  # Chromium's sandbox refuses root
        browser = started.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@contextmanager
def open_page(
    browser: "Browser", url: str, *, expected_errors: int = 0, **context: Any
) -> Iterator["Page"]:
    """Open a page in a context of its own, without transitions: a colour is final once it is seen.

    At the end no script has failed, nothing violated the content-security policy, all requests went
    to the server, and the console has no errors but `expected_errors` responses with an error.
    """
    origin = urlsplit(url)[:2]
    errors: list[str] = []
    failed_loads: list[str] = []
    strangers: list[str] = []

    def on_console(message: Any) -> None:
        if message.type == "error":
            is_load = message.text.startswith("Failed to load resource: the server responded")
            (failed_loads if is_load else errors).append(message.text)

    def on_request(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in _OWN_SCHEMES and address[:2] != origin:
            strangers.append(request.url)

    steady = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
    opened = browser.new_context(**{**steady, **context})
    opened.set_default_timeout(TIMEOUT_MS)
    page = opened.new_page()
    page.on("console", on_console)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", on_request)
    try:
        page.goto(url)
        yield page
    finally:
        opened.close()
    assert errors == []
    assert strangers == []
    assert len(failed_loads) == expected_errors, failed_loads


def is_beside(popup: "Locator", other: "Locator") -> bool:
    """Return whether a popup is inside of the window and outside of another element."""
    box, covered = _edges(popup), _edges(other)
    size = popup.page.viewport_size
    assert size is not None
    is_inside = min(box) >= 0 and box[2] <= size["width"] and box[3] <= size["height"]
    is_beside = box[2] <= covered[0] or covered[2] <= box[0]
    return is_inside and (is_beside or box[3] <= covered[1] or covered[3] <= box[1])


def _edges(locator: "Locator") -> tuple[float, float, float, float]:
    """Return the left, top, right and bottom edges of an element."""
    box = locator.bounding_box()
    assert box is not None
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]
