"""Drafted tokens in Chromium: which tokens of a text came as drafts, and what that saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.inspector.test_chat_view import send
from tests.server.inspector.test_playground import DONE, facts, fill, run
from tests.server.inspector.test_shell import VIOLATIONS, serious
from tests.support.browser import open_page
from tests.support.chats import TEMPLATE
from tests.support.serving import RunningServer, loader, read_events
from tests.support.speculation import draft_always

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[RunningServer]:
    """A server that drafts by n-grams: which tokens it drafts depends on no time."""
    load = loader(tiny_model, backend="numpy", speculative_config={"method": "ngram"})
    with RunningServer(lambda: draft_always(load()), chat_template=TEMPLATE) as running:
        yield running


def kind_of(token_id: int, draft: int | None) -> str:
    """Return the class of a token."""
    if draft is None:
        return "plain"
    return "draft-accepted" if token_id == draft else "draft-rejected"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_that_came_as_drafts_are_marked(
    browser: "Browser", drafting: RunningServer, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    bodies: list[bytes] = []

    def copy(route: "Route") -> None:
        response = route.fetch()
        bodies.append(response.body())
        route.fulfill(response=response)

    with open_page(browser, drafting.url, color_scheme=scheme) as page:
        num_steps = drafting.engine.engine.num_steps
        page.route("**/v1/completions", copy, times=1)
        tokens = run(page, "the the a the the", max_tokens=24)
        saved = 24 - (drafting.engine.engine.num_steps - num_steps)
        pieces = [event["choices"][0] for event in read_events(bodies[0])]
        ids = [each for piece in pieces for each in piece["token_ids"]]
        drafts = [each for piece in pieces for each in piece["drafted_token_ids"]]
        page.locator(".segment", has_text="Drafts").click()
        kinds = list(map(kind_of, ids, drafts))
        classes = [str(token.get_attribute("class")).split() for token in tokens.all()]
        assert [names[1] for names in classes] == kinds
        assert set(kinds) == {"draft-accepted", "plain", "draft-rejected"}
        count = kinds.count("draft-accepted")
        assert 0 < saved <= count
        text = f"{count} of 24 tokens came as drafts, {saved} steps saved"
        assert facts(page.locator(".figures"))["Speculative decoding"] == text
        rejected = tokens.nth(kinds.index("draft-rejected"))
        rejected.hover()
        draft = facts(page.locator("#tooltip"))["Draft"]
        assert draft.endswith(", rejected")
        assert (rejected.get_attribute("aria-label") or "").endswith(f", draft {draft}")
        page.mouse.move(0, 0)
        assert serious(Axe().run(page, options=VIOLATIONS).response) == []

        rejected.click()
        page.locator(".bar-button").nth(1).click()
        page.locator(DONE, has_text="new, ").wait_for()
        chosen = page.locator(".token.chosen")
        assert "plain" in str(chosen.get_attribute("class")), "it was not drafted"
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_chat_says_what_its_drafts_saved(browser: "Browser", drafting: RunningServer) -> None:
    with open_page(browser, f"{drafting.url}/#chat") as page:
        fill(page, "max_tokens", 24)
        fill(page, "temperature", 0)
        fill(page, "extra", '{"ignore_eos": true}')
        send(page, "the the a the the")
        page.locator(".segment:visible", has_text="Drafts").click()
        count = page.locator(".token.draft-accepted").count()
        assert count > 0
        page.locator(".chat-turn", has_text=f"{count} of 24 tokens came as drafts").wait_for()


def test_without_drafts_nothing_is_said(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, server.url) as page:
        run(page, "the end")
        assert "Speculative decoding" not in facts(page.locator(".figures"))
        assert page.locator(".segment:visible").all_text_contents() == [
            *("Probability", "Entropy", "None")
        ]
