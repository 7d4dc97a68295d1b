"""The Playground in Chromium: streams, alternatives, branches, scores and copied requests."""

import json
import math
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import is_beside, open_page
from tests.support.serving import TIMEOUT_S, RunningServer, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

DONE = ".choice:not(.running) .figures:not([hidden])"
COPIED = "() => navigator.clipboard.readText()"
STREAMING = {
    *("stream", "return_token_ids", "return_drafted_token_ids", "return_tokens_as_token_ids"),
    "request_id",
}


def run(page: "Page", prompt: str, *, action: str = "Generate", **settings: Any) -> "Locator":
    """Fill in the prompt and the settings, start, wait for the end and return the tokens."""
    page.locator(".prompt-input").first.fill(prompt)
    for name, value in {"max_tokens": 8, "temperature": 0, **settings}.items():
        fill(page, name, value)
    page.get_by_role("button", name=action, exact=True).click()
    page.locator(DONE).first.wait_for()
    return page.locator(".choice .token")


def fill(page: "Page", name: str, value: Any) -> None:
    """Fill in a setting, whose section may be folded."""
    field = page.locator(f"[name={name}]")
    if not field.is_visible():
        page.locator("details", has=field).last.locator("summary").click()
    field.fill(str(value))


def token_texts(page: "Page") -> list[str]:
    return [label.rsplit(", ", 1)[0] for label in labels(page)]


def labels(page: "Page") -> list[str]:
    tokens = page.locator(".choice .token").all()
    return [str(token.get_attribute("aria-label")) for token in tokens]


def test_generation_streams_into_tokens_with_their_figures(
    browser: "Browser", server: RunningServer
) -> None:
    body: Any = {"max_tokens": 8, "temperature": 0, "logprobs": 10}
    answer = server.complete("the end", **body, return_tokens_as_token_ids=True)["choices"][0]
    with open_page(browser, server.url) as page:
        for name, value in {"temperature": "1", "top_k": "0 (all)", "min_p": "0"}.items():
            page.locator(f"[name={name}][placeholder='{value}']").wait_for(state="attached")
        with page.expect_request("**/v1/completions") as request:
            tokens = run(page, "the end")
        body = request.value.post_data_json
        assert body["stream"] is True
        assert (body["prompt"], body["max_tokens"], body["logprobs"]) == ("the end", 8, 10)
        assert tokens.count() == 8
        figures = page.locator(".figures").inner_text()
        assert all(name in figures for name in ("Time to first token", "Speed", "Perplexity"))
        page.get_by_text("stopped at max_tokens").wait_for()
        page.get_by_text("Times are measured in this browser").wait_for()
        chart = page.get_by_role("img", name="Probability of 8 tokens")
        assert chart.locator("circle").count() == 8

        tokens.nth(2).hover()
        tooltip = page.locator("#tooltip")
        chance = math.exp(answer["logprobs"]["token_logprobs"][2])
        shown = facts(tooltip)
        value, unit = shown["Log-probability"].split("\u202f")
        assert float(value.replace("\u2212", "-")) == pytest.approx(math.log(chance), rel=1e-2)
        assert unit == shown["Entropy, at least"].split("\u202f")[1] == "nats"
        assert shown["Rank"] == "1", "greedy"
        top = list(answer["logprobs"]["top_logprobs"][2].values())
        listed = sum(-math.exp(logprob) * logprob for logprob in top)
        rest = 1 - sum(map(math.exp, top))
        least = listed + rest * max(-min(top), -math.log(rest))
        assert least > listed - rest * math.log(rest), "other tokens count as several"
        entropy = float(shown["Entropy, at least"].split("\u202f")[0])
        assert entropy == pytest.approx(least, abs=0.051), "of two digits"
        assert tooltip.locator(".bars li").count() == 5


def facts(parent: "Locator") -> dict[str, str]:
    """Return the figures of a tooltip or popover by name."""
    names = parent.locator("dt").all_text_contents()
    return dict(zip(names, parent.locator("dd").all_text_contents(), strict=True))


def test_an_alternative_continues_by_keyboard_and_keeps_the_text_before(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:
        run(page, "the end", logprobs=20)
        before = token_texts(page)
        page.locator(".choice .token").first.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        popover = page.get_by_role("dialog", name="Alternatives of the token")
        popover.wait_for()
        assert is_beside(popover, page.locator(".choice .token-text"))
        page.keyboard.press("Escape")
        popover.wait_for(state="detached")
        page.keyboard.press("Enter")  # the focus is on the token again
        choices = popover.locator(".bar-button")
        assert choices.count() == 20
        sizes = "list => [list.scrollHeight, list.clientHeight]"
        whole, visible = popover.locator(".choices").evaluate(sizes)
        assert visible < whole, "the list scrolls, the popover does not"
        assert popover.evaluate("list => list.scrollHeight <= list.clientHeight")
        page.keyboard.press("ArrowDown")
        chosen = choices.nth(1).locator(".bar-name").text_content()
        with page.expect_request("**/v1/completions") as request:
            page.keyboard.press("Enter")
        page.locator(".history-item", has_text="from").wait_for()
        page.locator(DONE).wait_for()
        after = token_texts(page)
        assert after[:3] == before[:3]
        assert after[3] == chosen != before[3]
        assert len(after) == 3 + 1 + 8
        assert facts(page.locator(".figures"))["Tokens"] == "8 new, 12 in all"
        body: Any = request.value.post_data_json
        ids = server.http.post("/tokenize", json={"prompt": "the end"}).json()["tokens"]
        assert body["prompt"][: len(ids)] == ids
        assert len(body["prompt"]) == len(ids) + 4
        expected = server.complete(body["prompt"], max_tokens=8, temperature=0, logprobs=0)
        logprobs = expected["choices"][0]["logprobs"]["token_logprobs"]
        shown = [float(label.rsplit(", ", 1)[1].rstrip("\u202f%")) for label in labels(page)[4:]]
        assert shown == pytest.approx([100 * math.exp(value) for value in logprobs], rel=0.1)

        page.locator(".history-item", has_text="generate · 8 tokens").click()
        page.locator(DONE).wait_for()
        assert token_texts(page) == before


def test_stop_aborts_the_request_on_the_server(
    browser: "Browser", slow_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_server.engine.engine.runner, "step_s", 0.5)
    with open_page(browser, slow_server.url) as page:
        page.locator(".prompt-input").fill("the")
        page.locator("[name=max_tokens]").fill("100")
        page.locator(".prompt-input").press("Control+Enter")
        page.locator(".choice.running .token").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped by you").wait_for()
        wait_until(slow_server.is_idle)
        assert page.locator(".choice .token").count() < 100


def test_several_prompts_are_one_request_and_html_stays_text(
    browser: "Browser", server: RunningServer
) -> None:
    texts = ['<img src=x onerror="document.title=1">', "</textarea><script>alert(1)</script>"]
    with open_page(browser, server.url) as page:
        page.get_by_role("button", name="Add a prompt").click()
        page.locator(".prompt-input").nth(1).fill(texts[1])
        with page.expect_request("**/v1/completions") as request:
            run(page, texts[0], n=2, max_tokens=4)
        page.locator(DONE).nth(3).wait_for()
        assert json.loads(request.value.post_data or "")["prompt"] == texts
        shown = page.locator(".choice .prompt-text").all_text_contents()
        assert shown == [texts[0], texts[0], texts[1], texts[1]]
        page.get_by_role("button", name="Score prompt").click()
        page.locator(".history-item", has_text="score").wait_for()
        page.locator(DONE).nth(1).wait_for()
        scored = page.locator(".choice .tokens").all_text_contents()
        assert scored == texts
        assert page.locator(".choice img, .choice script").count() == 0


def test_scoring_shows_where_the_probability_of_a_prompt_collapses(
    browser: "Browser", server: RunningServer
) -> None:
    prompt = "in the é end"
    body = {"max_tokens": 0, "echo": True, "prompt_logprobs": 0, "return_token_ids": True}
    answer = server.complete(prompt, **body)["choices"][0]
    ids = answer["prompt_token_ids"]
    chances = [
        entries[str(token_id)]
        for token_id, entries in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
    ]
    lowest = min(range(len(chances)), key=lambda index: chances[index]["logprob"])
    with open_page(browser, server.url) as page:
        tokens = run(page, prompt, action="Score prompt")
        assert tokens.count() == len(ids)
        page.locator(".figure", has_text=f", position {lowest + 1} (from 0)").wait_for()
        tokens.nth(lowest + 1).focus()
        shown = facts(page.locator("#tooltip"))
        assert shown["Rank"] == str(chances[lowest]["rank"])
        assert shown["Token id"] == str(ids[lowest + 1])
        byte_values = page.locator(".choice .byte-values").all_text_contents()
        assert byte_values == ["\\xC3", "\\xA9"], "each is half of a character"
        assert page.locator(".choice .tokens").text_content() == "in the \\xC3\\xA9é end"
        page.locator(".segment", has_text="Entropy").click()
        page.locator(".scale-title", has_text="Entropy, at least").wait_for()


def test_errors_are_shown_beside_the_button_and_at_their_setting(
    browser: "Browser", server: RunningServer
) -> None:
    size = {"width": 1280, "height": 500}
    with open_page(browser, server.url, viewport=size, expected_errors=2) as page:
        start = page.get_by_role("button", name="Generate", exact=True)
        message = page.locator(".playground-results > div > .message.error")
        page.locator(".prompt-input").fill("a" * 200)
        page.locator("[name=seed]").fill("7")
        start.click()
        message.wait_for()
        box = message.bounding_box()
        assert box is not None
        assert 0 <= box["y"] <= 500 - box["height"], "in sight"
        assert page.locator(".choice:visible").count() == 0, "the prompt is not repeated"
        failed = page.locator(".history-item", has_text="generate · failed")
        assert failed.locator("span").last.inner_text().endswith(" · seed 7")

        temperature = page.locator("[name=temperature]")
        temperature.fill("-1")
        start.click()
        page.locator("[name=temperature][aria-invalid=true]").wait_for()
        temperature.fill("0")
        page.locator("[name=n]").fill("20000")
        start.click()
        page.get_by_text("Choices is 20000, but must be at most 128.").wait_for()
        page.locator("[name=n]").fill("")
        page.evaluate("""() => {
            const real = window.fetch;
            window.restore = () => { window.fetch = real; };
            window.fetch = () => Promise.reject(new TypeError("refused"));
        }""")
        start.click()
        page.get_by_text("The server cannot be reached.").locator("visible=true").first.wait_for()
        assert page.locator("[aria-invalid]").count() == 0
        page.locator(".dot.unreachable").wait_for()
        page.evaluate("restore(); document.dispatchEvent(new Event('visibilitychange'))")
        page.locator(".dot.ready").wait_for()
        message.wait_for(state="detached")
        page.locator(".history-item", has_text="failed").first.click()
        page.get_by_text("This run failed: The server cannot be reached.").wait_for()

        page.locator(".prompt-input").fill("a")
        page.locator("[name=logprobs]").fill("")
        page.locator("[name=max_tokens]").fill("2")
        start.click()
        page.locator(DONE).wait_for()


def test_copied_requests_work_where_they_are_pasted(
    browser: "Browser", server: RunningServer
) -> None:
    prompt = 'it\'s "the" $HOME\n\\end é'
    settings: dict[str, Any] = {"top_k": 5, "logit_bias": "5: 2.5", "stop": "\\n", "seed": 7}
    with open_page(browser, server.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        with page.expect_request("**/v1/completions") as request:
            run(page, prompt, **settings, temperature=1)
        sent: Any = request.value.post_data_json
        copied = {}
        for name in ("curl", "Python"):
            page.get_by_role("button", name=f"Copy as {name}").click()
            page.locator(".toast", has_text=name).wait_for()
            copied[name] = page.evaluate(COPIED)
        page.locator(".history-item", has_text="seed 7 · temperature 1").wait_for()

        page.locator(".choice .token").nth(1).click()
        with page.expect_request("**/v1/completions") as request:
            page.locator(".bar-button").nth(1).click()
        page.locator(".history-item").nth(1).wait_for()
        page.get_by_role("button", name="Copy as curl").click()
        continued: Any = request.value.post_data_json
        fields = {name: continued[name] for name in continued if name not in STREAMING}
        wait_until(lambda: "curl" in page.evaluate(COPIED))  # before it, the clipboard has Python
        text = page.evaluate(COPIED)
        body = text.partition("-d '")[2].rpartition("'")[0]
        assert json.loads(body) == fields, "the prompt with the kept tokens"
    fields = {"prompt": prompt, "top_k": 5, "logit_bias": {"5": 2.5}, "stop": ["\n"], "seed": 7}
    assert {name: sent[name] for name in fields} == fields
    expected = server.complete(**{name: sent[name] for name in sent if name not in STREAMING})
    printed = pasted([sys.executable, "-W", "ignore", "-c", copied["Python"]])
    assert printed.rstrip("\n") == expected["choices"][0]["text"].rstrip("\n")
    if shutil.which("curl") and shutil.which("sh"):
        answer = json.loads(pasted(["sh", "-c", copied["curl"]]))
        assert answer["choices"][0]["text"] == expected["choices"][0]["text"]


def pasted(command: list[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=4 * TIMEOUT_S, check=True
    ).stdout
