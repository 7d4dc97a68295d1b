"""The engine view in Chromium: it follows the scheduler, and pauses, steps and replays."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import open_page
from tests.support.serving import RunningServer, loader, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NUM_REQUESTS = 20
MAX_NUM_SEQS = 8
MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def watched(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that a page may pause, with fewer sequence slots than requests."""
    settings = {"inspector_controls": True, "inspector_shows_prompts": True}
    with RunningServer(loader(tiny_model, max_num_seqs=MAX_NUM_SEQS), **settings) as running:
        yield running


def figure(page: "Page", name: str) -> int:
    return int(page.locator(f"[data-figure={name}]").inner_text().replace("\u202f", ""))


def rows(page: "Page", state: str) -> int:
    listed = page.get_by_role("list", name=f"{state} requests").get_by_role("listitem")
    return int(listed.count())


def page_equals_metrics(page: "Page", server: RunningServer) -> bool:
    now = server.samples()
    total = server.http.get("/v1/engine/state").json()["blocks"]["total"]
    return (
        figure(page, "running") == rows(page, "Running") == now["num_requests_running"]
        and figure(page, "waiting") == rows(page, "Waiting") == now["num_requests_waiting"]
        and figure(page, "blocks") == round(now["kv_cache_usage_perc"] * total)
    )


def click(page: "Page", name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def status(page: "Page", text: str) -> None:
    page.locator(".v-live", has_text=text).wait_for()


def step_record(state: dict[str, Any], step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time_s": 0.0,
        "duration_s": 0.001,
        "num_tokens": 1,
        "num_prompt_tokens": 0,
        "num_decode_tokens": 1,
        "sequences": [],
        "admitted": ["r0"],
        "finished": [],
        "preempted": [{"id": "r0", "reason": "no block was free"}],
        "num_copies": 0,
        "cache_hits": [{"id": "r0", "tokens": 96}],
        "blocks": state["blocks"],
    }


def stream_once(page: "Page", frames: list[dict[str, Any]]) -> None:
    """Answer the first request for events with frames, and no later one."""
    events = "".join(f"event: state\ndata: {json.dumps(frame)}\n\n" for frame in frames)
    streams: list[Any] = []

    def answer_once(route: Any) -> None:
        streams.append(route)
        if len(streams) == 1:
            route.fulfill(body=events, content_type="text/event-stream")

    page.route("**/v1/engine/events", answer_once)


def test_the_view_follows_concurrent_requests_and_replays_their_steps(
    browser: "Browser", watched: RunningServer
) -> None:
    with (
        open_page(browser, f"{watched.url}/#engine") as page,
        ThreadPoolExecutor(NUM_REQUESTS) as clients,
    ):
        click(page, "Pause")
        status(page, "Paused")
        sent = [
            clients.submit(watched.complete, MARKUP, max_tokens=24, ignore_eos=True)
            for _ in range(NUM_REQUESTS)
        ]
        wait_until(lambda: figure(page, "waiting") == NUM_REQUESTS)
        assert page_equals_metrics(page, watched)

        for step in range(1, 4):
            click(page, "Step")
            status(page, f"Paused after step {step}")
        wait_until(lambda: page_equals_metrics(page, watched))
        assert figure(page, "running") == MAX_NUM_SEQS
        waiting = page.get_by_role("list", name="Waiting requests")
        assert f"max_num_seqs {MAX_NUM_SEQS}" in waiting.inner_text()
        assert page.get_by_text(MARKUP).first.is_visible()
        assert page.locator("main img, main b").count() == 0

        details = page.locator(".v-step h3")
        click(page, "Previous step")
        status(page, "Replay of step 2")
        assert details.inner_text().startswith("Step 2:")
        page.get_by_role("slider", name="Replay step").press("ArrowLeft")
        status(page, "Replay of step 1")
        assert details.inner_text().startswith("Step 1:")
        click(page, "Next step")
        status(page, "Replay of step 2")
        click(page, "Live")
        status(page, "Paused after step 3")

        first = page.get_by_role("list", name="Running requests").locator("button.v-request").first
        first.click()
        assert first.get_attribute("aria-pressed") == "true"
        click(page, "Resume")
        answers = [request.result() for request in sent]
        assert all(answer["usage"]["completion_tokens"] == 24 for answer in answers)
        wait_until(lambda: figure(page, "blocks") == 0)
        assert page_equals_metrics(page, watched)
        events = page.get_by_role("region", name="Events, newest first")
        assert "finished: length" in events.inner_text()


def test_a_run_of_the_playground_links_to_its_row(
    browser: "Browser", watched: RunningServer
) -> None:
    with (
        open_page(browser, f"{watched.url}/#engine") as watching,
        open_page(browser, watched.url) as page,
    ):
        click(watching, "Pause")  # which lasts while this page is open
        status(watching, "Paused")
        page.locator("[name=n]").fill("2")
        page.locator("[name=max_tokens]").fill("4")
        with page.expect_request("**/v1/completions") as request:
            click(page, "Generate")
        body: Any = request.value.post_data_json
        links = page.locator(".choice a:visible")
        wait_until(lambda: links.count() == 2 and rows(watching, "Waiting") == 2)
        links.nth(1).click()
        row = page.locator("[aria-pressed=true]")
        row.wait_for()
        assert row.evaluate("element => element === document.activeElement")
        name = f"cmpl-{body['request_id']}"
        assert (row.get_attribute("title") or "").endswith(f"-{name}-1")
        assert row.locator(".v-id").inner_text() == f"{name[:13]}\u2026"
        click(watching, "Resume")
        wait_until(lambda: rows(page, "Running") == rows(page, "Waiting") == 0)
        page.get_by_role("tab", name="Playground").click()
        links.first.click()
        page.get_by_text(f"({name[:13]}\u2026) has ended.").wait_for()
        assert row.count() == 0, "nothing is dimmed for a request without a row"


def test_a_replay_shows_no_state_of_a_later_step(
    browser: "Browser", watched: RunningServer
) -> None:
    """Steps 1, 2, 5 and 6 are recorded, with snapshots after steps 2 and 6."""
    state = {**watched.http.get("/v1/engine/state").json(), "last_step": None}
    steps = [step_record(state, number) for number in (1, 2, 5, 6)]
    frames = [
        {**state, "step": number, "blocks": {**state["blocks"], "used": number}}
        for number in (2, 6)
    ]
    with open_page(browser, watched.url) as page:
        stream_once(page, frames)
        page.route("**/v1/engine/steps?*", lambda route: route.fulfill(json={"steps": steps}))
        page.get_by_role("tab", name="Engine").click()
        status(page, "Live")
        log = page.get_by_role("region", name="Events, newest first")
        banner = page.get_by_text("No snapshot at or before this step")
        seen = []
        for step in (5, 2, 1):
            click(page, "Previous step")
            status(page, f"Replay of step {step}")
            seen.append((figure(page, "blocks"), banner.is_visible()))
            is_stale = page.get_by_text("figures are those after step 2, the nearest").is_visible()
            marked = page.locator("[data-after='after step 2']:visible").count()
            assert (is_stale, marked) == ((False, 0) if step == 2 else (True, 6))
            assert ("2 steps not recorded" in log.inner_text()) == (step == 5)
        assert seen == [(2, False), (2, False), (2, True)]
        assert "v-faded" in (page.locator(".v-tiles").get_attribute("class") or "")
        assert "again" not in log.inner_text()
        page.get_by_role("slider", name="Replay step").press("ArrowRight")
        status(page, "Replay of step 2")
        assert "admitted again" in log.inner_text()
        assert "resumed: 96 of its tokens were still cached" in log.inner_text()


def test_a_pause_loads_the_steps_that_the_stream_has_omitted(
    browser: "Browser", watched: RunningServer
) -> None:
    state = {**watched.http.get("/v1/engine/state").json(), "last_step": None, "is_paused": False}
    steps = [step_record(state, number) for number in range(1, 7)]
    request = {
        "id": "r0",
        "choice": 0,
        "state": "waiting",
        "phase": "queued",
        "reason": None,
        "prompt_tokens": 4,
        "computed_tokens": 0,
        "reused_tokens": 0,
        "output_tokens": 0,
        "max_tokens": 8,
        "num_blocks": 0,
        "preemptions": 0,
        "age_s": 5.5,
    }
    frames = [
        {**state, "step": 2, "steps": []},
        {**state, "step": 6, "steps": steps[5:], "steps_omitted": 3},
        {**state, "step": 6, "is_paused": True, "requests": [request]},
    ]
    loads: list[Any] = []

    def answer_first(route: Any) -> None:
        loads.append(route)
        if len(loads) == 1:
            route.fulfill(json={"steps": steps[:2]})

    with open_page(browser, watched.url) as page:
        stream_once(page, frames)
        page.route("**/v1/engine/steps?*", answer_first)
        page.get_by_role("tab", name="Engine").click()
        status(page, "Paused after step 6")
        log = page.get_by_role("region", name="Events, newest first")
        gap = log.get_by_text("… 3 steps not shown")
        wait_until(lambda: gap.count() == 1 and len(loads) == 2)
        loads[1].fulfill(json={"steps": steps})
        gap.wait_for(state="detached")
        log.get_by_label("Replay step 4").first.wait_for()
        age = page.locator("[data-label=Age]")
        first = age.inner_text()
        wait_until(lambda: age.inner_text() != first)


def test_the_stream_is_open_only_while_the_view_is_shown(
    browser: "Browser", watched: RunningServer
) -> None:
    with open_page(browser, f"{watched.url}/#engine") as page:
        status(page, "Live")
        with page.expect_event("requestfailed", lambda r: r.url.endswith("/v1/engine/events")):
            page.get_by_role("tab", name="Playground").click()
        with page.expect_request("**/v1/engine/events"):
            page.get_by_role("tab", name="Engine").click()


def test_a_pause_is_shown_in_every_tab_and_ends_there(
    browser: "Browser", watched: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = watched.engine.inspector
    monkeypatch.setattr(inspector, "lease_s", 60.0)
    with open_page(browser, watched.url) as page:
        page.locator(".dot.ready").wait_for()
        banner = page.locator(".paused-banner")
        assert not banner.is_visible()
        response = watched.http.post("/v1/engine/control", json={"action": "pause"})
        assert response.status_code == 200
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # asks for health
        banner.wait_for()
        page.locator("#status .dot.paused").wait_for()
        assert page.locator("#status .status-text").inner_text() == "paused"
        for tab in ("Chat", "Engine", "Playground"):
            page.get_by_role("tab", name=tab).click()
            assert "The engine is paused" in banner.inner_text()
        page.get_by_role("tab", name="Engine").click()
        status(page, "Paused")
        page.get_by_text("The pause ends in").wait_for()
        page.get_by_role("tab", name="Chat").click()
        click(page, "Resume the engine")
        banner.wait_for(state="hidden")
        page.locator("#status .dot.ready").wait_for()
        wait_until(lambda: not inspector.is_paused)


def test_a_refused_stream_is_opened_again_by_the_reader_only(
    browser: "Browser", watched: RunningServer
) -> None:
    asked: list[str] = []

    def refuse(route: Any) -> None:
        asked.append(route.request.url)
        error = {"message": f"refusal {len(asked)}", "type": "x", "param": None, "code": 403}
        route.fulfill(status=403, json={"error": error})

    with open_page(browser, watched.url, expected_errors=2) as page:
        page.route("**/v1/engine/events", refuse)
        page.get_by_role("tab", name="Engine").click()
        page.get_by_text("refusal 1", exact=True).wait_for()
        click(page, "Try again")
        page.get_by_text("refusal 2", exact=True).wait_for()


def test_a_server_without_controls_says_why(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, f"{server.url}/#engine") as page:
        page.get_by_text("--inspector-controls").wait_for()
        page.get_by_text("No request waits. One would if").wait_for()
        assert page.get_by_role("button", name="Pause", exact=True).is_disabled()
