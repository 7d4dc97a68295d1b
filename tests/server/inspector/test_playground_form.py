"""The form of the Playground in Chromium: lengths, settings, links, reloads, focus and errors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from tests.server.inspector.test_playground import COPIED, DONE, fill, run, token_texts
from tests.support.browser import open_page
from tests.support.serving import RunningServer, loader, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CONTEXT = 40
MARKUP = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[RunningServer]:
    """A server whose context is shorter than the page's own lengths."""
    with RunningServer(loader(tiny_model, max_model_len=CONTEXT)) as running:
        yield running


def sent_by(page: "Page", name: str) -> dict[str, Any]:
    """Click a button; return the completion that it requests, after its successful response."""
    with page.expect_response("**/v1/completions") as response:
        page.get_by_role("button", name=name, exact=True).click()
    assert response.value.ok
    body: Any = response.value.request.post_data_json
    return dict(body)


def test_lengths_fit_into_the_context_of_the_served_model(
    browser: "Browser", small: RunningServer
) -> None:
    with open_page(browser, small.url) as page:
        prompt = page.locator(".prompt-input").input_value()
        count = small.http.post("/tokenize", json={"prompt": prompt}).json()["count"]
        assert prompt == "She smiled and said", "as in the command line's hints"
        room = CONTEXT - count
        assert 0 < room < 64, "the page wants 64 tokens"
        assert page.locator("[name=max_tokens]").input_value() == "64"
        page.locator(".dot.ready").wait_for()
        assert sent_by(page, "Generate")["max_tokens"] == room
        page.locator(DONE).wait_for()
        page.locator("[name=max_tokens][placeholder='64']").wait_for(state="detached")
        fill(page, "max_tokens", "5")
        assert sent_by(page, "Generate")["max_tokens"] == 5
        fill(page, "max_tokens", "")
        assert sent_by(page, "Generate")["max_tokens"] == room, "as many as fit"
        page.get_by_role("tab", name="Engine").click()
        samples = sent_by(page, "Send 8 sample prompts")
        assert samples["max_tokens"] + samples["truncate_prompt_tokens"] == CONTEXT
        assert "temperature" not in samples, "the model's own"


def test_a_reload_keeps_prompt_settings_and_results_until_they_are_cleared(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        run(page, "the end", min_p="0.1", stop="zzz")
        page.get_by_role("button", name="Add a prompt").click()
        page.locator(".prompt-input").nth(1).fill("a second")
        run(page, "the cat", action="Score prompt")
        before = page.locator(".choice .tokens").all_text_contents()
        page.reload()
        page.locator(DONE).nth(1).wait_for()
        assert page.locator(".choice .tokens").all_text_contents() == before
        prompts = page.locator(".prompt-input")
        assert [prompts.nth(place).input_value() for place in (0, 1)] == ["the cat", "a second"]
        for name, value in {"min_p": "0.1", "stop": "zzz", "max_tokens": "8"}.items():
            assert page.locator(f"[name={name}]").input_value() == value
        assert page.locator(".history-item").count() == 2
        page.locator(".history-item").last.click()
        wait_until(lambda: prompts.count() == 1)
        assert prompts.input_value() == "the end"
        assert len(token_texts(page)) == 8

        page.get_by_role("button", name="Clear the history").click()
        page.evaluate("sessionStorage.setItem('nanovllm.playground.form', '{')")
        page.reload()
        page.get_by_text("No tokens yet").wait_for()
        assert page.locator(".history-item").count() == 0


def test_a_link_fills_in_the_form_runs_nothing_and_gives_the_same_text(
    browser: "Browser", server: RunningServer
) -> None:
    rights: dict[str, Any] = {"permissions": ["clipboard-read", "clipboard-write"]}
    with open_page(browser, server.url, **rights) as page:
        run(page, "it's & the\n+ end#", temperature=1, top_k=50)
        texts = token_texts(page)
        page.get_by_role("button", name="Copy link").click()
        page.locator(".toast", has_text="Copied the link").wait_for()
        link = page.evaluate(COPIED)
    started: list[str] = []
    with open_page(browser, link) as page:
        page.on("request", lambda request: started.append(request.url))
        page.locator(".toast", has_text="filled in from the link").wait_for()
        assert page.locator(".prompt-input").input_value() == "it's & the\n+ end#"
        assert page.locator("[name=top_k]").input_value() == "50"
        assert page.evaluate("location.hash") == "#playground"
        page.locator(".dot.ready").wait_for()
        assert not [url for url in started if "completions" in url]
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator(DONE).wait_for()
        assert token_texts(page) == texts, "the seed is a part of the link"
        page.locator(".prompt-input").fill("x" * 20_000)
        page.get_by_role("button", name="Copy link").click()
        page.get_by_text("The prompts are too long for a link.").wait_for()


def test_a_hostile_link_is_text_and_bounded(browser: "Browser", server: RunningServer) -> None:
    prompts = [("prompt", f"{number} {MARKUP}") for number in range(9)]
    fields = [("seed", MARKUP), ("stop", MARKUP), ("__proto__", "1"), ("api_key", "x"), ("n", "2")]
    with open_page(browser, f"{server.url}/#playground?{urlencode(prompts + fields)}") as page:
        page.locator(".toast").wait_for()
        shown = [field.input_value() for field in page.locator(".prompt-input").all()]
        assert shown == [text for _, text in prompts[:4]]
        assert page.locator("[name=seed]").input_value() == "", "no number"
        assert page.locator("[name=stop]").input_value() == MARKUP
        assert page.locator("[name=n]").input_value() == "2"
        assert page.locator("main img").count() == 0
        page.goto(f"{server.url}/#playground?prompt={'a' * 16_000}")
        assert page.locator(".prompt-input").first.input_value() == shown[0], "not filled in"
        assert page.title().startswith("Playground")


def test_structured_outputs_have_fields(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, server.url) as page:
        fill(page, "choice", "the\nend")
        fill(page, "max_tokens", "8")
        body = sent_by(page, "Generate")
        assert body["structured_outputs"] == {"choice": ["the", "end"]}
        page.locator(DONE).wait_for()
        shown = page.locator(".choice .tokens").text_content() or ""
        assert shown.removesuffix("<|endoftext|>") in ("the", "end")
        fill(page, "json_schema", '{"type": "boolean"}')
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_text("fill in one kind of structured output only").wait_for()
        fill(page, "choice", "")
        assert sent_by(page, "Generate")["structured_outputs"] == {"json": {"type": "boolean"}}
        fill(page, "json_schema", "{")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.get_by_text("JSON schema: this is no JSON").wait_for()


def test_sliders_presets_and_fields_agree(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, server.url) as page:
        field = page.locator("[name=temperature]")
        slider = page.get_by_role("slider", name="Temperature")
        page.locator("[name=temperature][placeholder='1']").wait_for()
        assert (field.input_value(), slider.input_value()) == ("", "1"), "the model's default"
        page.get_by_role("button", name="Balanced").click()
        assert (field.input_value(), slider.input_value()) == ("0.7", "0.7")
        slider.press("ArrowRight")
        assert field.input_value() == "0.8"
        field.fill("1.5")
        assert slider.input_value() == "1.5"
        page.get_by_role("button", name="Defaults").click()
        assert (field.input_value(), slider.input_value()) == ("", "1")
        assert page.locator("[name=top_p]").input_value() == ""


def test_the_keyboard_starts_from_every_field_and_stays_at_the_chosen_alternative(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        assert page.get_by_label("Generate", exact=True).count() == 0
        assert page.get_by_role("button", name="Generate", exact=True).count() == 1
        fill(page, "max_tokens", "6")
        with page.expect_response("**/v1/completions") as response:
            page.locator("[name=seed]").press("Control+Enter")
        assert response.value.ok
        page.locator(DONE).wait_for()
        page.locator(".choice .token").nth(2).focus()
        page.keyboard.press("Enter")
        page.locator(".bar-button").first.wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.locator(".history-item", has_text="from").wait_for()
        page.locator(DONE).wait_for()
        focused = page.evaluate("document.activeElement.className")
        assert "chosen" in focused
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.dataset.position") == "3"


def test_an_error_leaves_the_result_in_sight(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, server.url, expected_errors=1) as page:
        run(page, "the end")
        texts = token_texts(page)
        fill(page, "temperature", "-1")
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator(".message.error").wait_for()
        page.locator("[name=temperature][aria-invalid=true]").wait_for()
        assert token_texts(page) == texts
        assert page.locator(".choice").is_visible()
        current = page.locator(".history-item[aria-current=true]")
        assert "8 tokens" in current.inner_text()


def test_one_popup_is_open_and_shows_all_alternatives_near_the_bottom(
    browser: "Browser", server: RunningServer
) -> None:
    size = {"width": 1280, "height": 720}
    with open_page(browser, server.url, viewport=size) as page:
        tokens = run(page, "the end", max_tokens=60)
        last = tokens.last
        last.evaluate("token => scrollTo(0, scrollY + token.getBoundingClientRect().top - 600)")
        last.click()
        popover = page.get_by_role("dialog", name="Alternatives of the token")
        popover.wait_for()
        tokens.first.hover(force=True)
        assert page.locator("#tooltip:visible").count() == 0
        scrolls = "element => element.scrollHeight - element.clientHeight"
        assert popover.locator(".bar-button").count() >= 10
        assert popover.evaluate(scrolls) == 0
        assert popover.locator(".choices").evaluate(scrolls) <= 8
        page.keyboard.press("Escape")
        page.mouse.move(0, 0)
        tokens.first.hover()
        page.locator("#tooltip:visible").wait_for()


def test_a_refused_copy_is_not_reported_as_a_copy(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        page.evaluate(
            "() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no'));"
            " document.execCommand = () => false; }"
        )
        page.get_by_role("button", name="Copy as curl").click()
        page.locator(".toast.error", has_text="does not allow this page to copy").wait_for()
        assert page.get_by_text("Copied the").count() == 0


def test_the_vocabulary_is_a_request_that_the_browser_can_keep(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        with page.expect_response("**/v1/engine/vocabulary") as response:
            run(page, "the end")
        assert response.value.request.post_data is None
        assert json.loads(response.value.text())["tokens"][0] == "!"
        assert response.value.headers["etag"]
