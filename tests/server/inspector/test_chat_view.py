"""The chat in Chromium: it streams, stops, edits, retries and continues from alternatives."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.inspector.test_playground import fill
from tests.support.browser import open_page
from tests.support.chats import TEMPLATE
from tests.support.serving import RunningServer, loader, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
LETTERS = list(range(64, 90))  # a to z; other tokens of the tiny model are no text
ANSWERED = ".chat-turn.assistant:not(.running)"


@pytest.fixture(scope="module")
def slow(tiny_model: Path) -> Iterator[RunningServer]:
    """A server with a chat template, whose steps take half a second."""
    with RunningServer(loader(tiny_model, step_s=0.5), chat_template=TEMPLATE) as running:
        yield running


def send(page: "Page", text: str) -> dict[str, Any]:
    """Send a message; return its request after the answer has ended."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    num_questions = page.locator(".chat-turn.user").count()
    page.locator(ANSWERED).nth(num_questions - 1).wait_for()
    body: Any = request.value.post_data_json
    return dict(body)


def messages(page: "Page") -> list[str]:
    """Return the texts of the conversation."""
    return page.locator(".chat-text, .chat-turn .tokens").all_text_contents()


def test_a_conversation_is_streamed_kept_edited_and_continued(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, f"{server.url}/#chat") as page:
        fill(page, "max_tokens", "6")
        fill(page, "temperature", "0")
        fill(page, "allowed_token_ids", ", ".join(map(str, LETTERS)))
        page.locator("[name=system]").fill("in")
        body = send(page, MARKUP)
        assert body["messages"] == [
            {"role": "system", "content": "in"}, {"role": "user", "content": MARKUP},
        ]  # fmt: skip
        assert (body["stream"], body["logprobs"], body["top_logprobs"]) == (True, True, 10)
        names = ("messages", "max_tokens", "temperature", "allowed_token_ids")
        asked = {name: body[name] for name in names}
        answer = server.http.post("/v1/chat/completions", json=asked).json()["choices"][0]
        expected = answer["message"]["content"]
        assert messages(page) == [MARKUP, expected]
        assert page.locator("main b, main img").count() == 0
        assert page.locator(".chat-turn .token[class*=seq-]").count() == 6, "coloured"

        body = send(page, "the end")
        assert [each["content"] for each in body["messages"]] == ["in", MARKUP, expected, "the end"]
        before = messages(page)
        page.reload()
        page.locator(ANSWERED).last.wait_for()
        assert messages(page) == before
        assert page.locator("[name=system]").input_value() == "in"

        page.locator(ANSWERED).last.locator(".token").nth(2).click()
        choice = page.locator(".bar-button").nth(1)
        chosen = choice.locator(".bar-name").text_content()
        with page.expect_request("**/v1/chat/completions") as request:
            choice.click()
        wait_until(lambda: page.locator(ANSWERED).last.locator(".token").count() == 9)
        continued: Any = request.value.post_data_json
        assert (continued["continue_final_message"], continued["add_generation_prompt"]) == (
            True,
            False,
        )
        kept = continued["messages"][-1]
        assert kept["role"] == "assistant"
        assert kept["content"].endswith((chosen or "").replace("\u2423", " "))
        assert messages(page)[3].startswith(kept["content"])

        with page.expect_request("**/v1/chat/completions"):
            page.get_by_role("button", name="Retry").last.click()
        wait_until(lambda: messages(page) == before)
        page.get_by_role("button", name="Edit").first.click()
        assert messages(page) == []
        box = page.get_by_role("textbox", name="Message", exact=True)
        assert box.input_value() == MARKUP
        assert box.evaluate("element => element === document.activeElement")


def test_the_tokens_of_a_stop_string_are_not_shown(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, f"{server.url}/#chat") as page:
        fill(page, "max_tokens", "8")
        fill(page, "temperature", "0")
        fill(page, "allowed_token_ids", ", ".join(map(str, LETTERS)))
        send(page, "the")
        whole = messages(page)[-1]
        fill(page, "stop", whole[5:7])
        page.get_by_role("button", name="Retry").click()
        end = page.locator(f"{ANSWERED} .badge").filter(has_text="stop string")
        end.wait_for()
        assert end.text_content() == f"stop string {whole[5:7]}"
        assert messages(page)[-1] == whole[: whole.index(whole[5:7])]


def test_an_answer_is_stopped_and_errors_keep_the_conversation(
    browser: "Browser", slow: RunningServer
) -> None:
    with open_page(browser, f"{slow.url}/#chat", expected_errors=1) as page:
        box = page.get_by_role("textbox", name="Message", exact=True)
        box.fill("the")
        page.get_by_role("button", name="Send").click()
        page.locator(".chat-turn.running .token").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped by you").wait_for()
        wait_until(slow.is_idle)
        fill(page, "temperature", "-1")
        box.fill("the end")
        page.keyboard.press("Enter")
        page.locator(".message.error").wait_for()
        page.locator("[name=temperature][aria-invalid=true]").wait_for()
        assert messages(page)[0::2] == ["the", "the end"]
        page.get_by_role("button", name="New chat").click()
        assert messages(page) == []


def test_without_a_chat_template_the_view_says_how_to_get_one(
    browser: "Browser", slow_server: RunningServer
) -> None:
    with open_page(browser, f"{slow_server.url}/#chat") as page:
        page.get_by_text("nanovllm serve MODEL --chat-template plain").wait_for()
        assert not page.locator("[name=message]").is_visible()
