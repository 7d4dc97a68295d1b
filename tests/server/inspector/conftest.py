"""The browser, once for a file; the server is the one that all tests of the server share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, until the end of the file: other files may call asyncio.run."""
    with chromium() as started:
        yield started
