"""How a row of attention is computed, in Chromium: the card shows the numbers of the formula."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.inspector.test_inspect_views import PROMPT, show
from tests.server.inspector.test_shell import CONTRAST, VIOLATIONS, serious
from tests.support.browser import open_page
from tests.support.serving import RunningServer, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CARD = ".v-row-card:not([aria-busy])"
SIGNS = """canvases => canvases.map(canvas => {
    const context = canvas.getContext("2d");
    const { data } = context.getImageData(0, 0, canvas.width, 1);
    return Array.from({ length: canvas.width }, (_, index) => data[index * 4] - data[index * 4 + 2])
})"""  # red minus blue of each dimension


def numbers_of(page: "Page", column: int) -> np.ndarray:
    cells = page.locator(f"{CARD} tbody td:nth-child({column}) .v-number-cell > :first-child")
    texts = cells.all_text_contents()
    return np.array([float(text.replace("\u2212", "-")) for text in texts])


def shown_row(server: RunningServer, page: "Page", query: int) -> dict[str, Any]:
    """Return the server's answer for the head that the page has chosen."""
    body = {"prompt": PROMPT, "query": query}
    for name in ("Layer", "Head"):
        select = page.get_by_role("combobox", name=name, exact=True)
        body[name.lower()] = int(select.input_value())
    return dict(server.http.post("/v1/inspect/attention_head", json=body).json())


def test_each_step_of_a_row_has_the_numbers_of_the_formula(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, f"{server.url}/#attention") as page:
        show(page, PROMPT, "Show attention")
        page.locator(f"{CARD} tbody tr").first.wait_for()
        for table_row in page.locator(f"{CARD} tbody tr").all():  # each is filled when it is seen
            table_row.scroll_into_view_if_needed()
            table_row.locator("canvas").last.wait_for()
        count = page.locator("#panel-attention .v-text-card .v-token").count()
        row = shown_row(server, page, count - 1)
        q, k, v = (np.array(row[name]) for name in "qkv")
        scores = k @ q / np.sqrt(len(q))
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()

        np.testing.assert_allclose(numbers_of(page, 3), scores, atol=6e-3)
        np.testing.assert_allclose(numbers_of(page, 4), weights, atol=6e-5)
        whole = np.stack([np.stack([q, weights @ v])])  # of the head and the foot of the table
        parts = np.stack([k, v, v * weights[:, None]], axis=1)
        for name, vectors in (("tr.v-whole", whole), ("tbody tr", parts)):
            strips = page.locator(f"{CARD} {name} canvas").evaluate_all(SIGNS)
            strips = np.array(strips).reshape(vectors.shape)
            for column in range(vectors.shape[1]):
                vector = vectors[:, column]
                visible = np.abs(vector) > 0.02 * max(np.abs(vector).max(), np.abs(v).max())
                assert visible.any()
                assert (np.sign(strips[:, column]) == np.sign(vector))[visible].all()
        card = page.locator(CARD)
        assert f"softmax(q K\u1d40 / \u221a{len(q)}) V" in (card.text_content() or "")
        assert "this token is the last" in (card.text_content() or "")

        keys = page.get_by_role("group", name="Keys of the row")
        keys.focus()
        page.keyboard.press("Home")
        for _ in row["q"]:
            page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowRight")
        reading = page.locator(f"{CARD} .v-row-reading")
        reading.get_by_text("Dimension 1:").wait_for()
        line = reading.locator("p").last.text_content() or ""
        words = line.replace("\u2212", "-").split()
        numbers = {name: float(words[words.index(name) + 1]) for name in ("q", "k", "v")}
        expected = {"q": q[1], "k": k[0, 1], "v": v[0, 1]}
        assert numbers == pytest.approx(expected, rel=6e-4)
        assert float(words[words.index("output") + 1]) == pytest.approx(row["output"][1], rel=6e-4)

        page.locator(".v-map-canvas").focus()
        page.keyboard.press("ArrowUp")
        card.get_by_text("the 1 later token of the prompt").wait_for()
        assert page.locator(f"{CARD} tbody tr").count() == count - 1


_UP_THREE_TIMES = """() => {
  for (let press = 0; press < 3; press += 1) {
    const options = { key: "ArrowUp", bubbles: true, cancelable: true };
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", options));
  }
}"""


def test_another_row_aborts_the_request_and_an_error_can_be_tried_again(
    browser: "Browser", server: RunningServer
) -> None:
    held: list[Route] = []
    aborted: list[str] = []
    message = "too many requests wait"

    def answer(route: "Route") -> None:
        held.append(route)
        if len(held) == 2:
            route.fulfill(status=429, json={"error": {"message": message, "param": None}})
        elif len(held) > 2:
            route.continue_()

    with open_page(browser, server.url, expected_errors=1) as page:
        page.route("**/v1/inspect/attention_head", answer)
        page.on("requestfailed", lambda request: aborted.append(request.url))
        page.get_by_role("tab", name="Attention").click()
        page.get_by_text("Computing the row").wait_for()
        wait_until(lambda: bool(page.evaluate("1")) and len(held) == 1)
        page.locator(".v-map-canvas").focus()
        page.evaluate(_UP_THREE_TIMES)  # faster than a request is sent for each
        page.get_by_role("alert").get_by_text(message).wait_for()
        assert len(held) == 2
        assert [url.rsplit("/", 1)[1] for url in aborted] == ["attention_head"]
        page.get_by_role("button", name="Try again").click()
        page.locator(f"{CARD} tbody tr").first.wait_for()
        assert page.locator(f"{CARD} [role=alert]").count() == 0
        queries = [dict(route.request.post_data_json or {})["query"] for route in held]
        assert queries[1:] == [queries[0] - 3] * 2


def test_a_long_row_scrolls_inside_its_card_on_a_narrow_screen(
    browser: "Browser", server: RunningServer
) -> None:
    """And axe finds no serious fault in it, in the dark theme none of colours."""
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    size = {"width": 390, "height": 800}
    with open_page(
        browser, f"{server.url}/#attention", viewport=size, color_scheme="light"
    ) as page:
        show(page, PROMPT, "Show attention")
        page.locator(f"{CARD} tbody tr").first.wait_for()
        box = page.locator(".v-row-scroll")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        assert box.evaluate("box => box.scrollHeight > box.clientHeight")
        box.focus()
        for key, edge in (("Home", "first"), ("End", "last")):
            page.keyboard.press(key)
            row = getattr(page.locator(".v-row-table tbody tr"), edge)
            assert row.get_attribute("class") == "v-active"
            assert is_uncovered(row), f"the {edge} key is between the query and the output"
        assert serious(axe.run(page, options=VIOLATIONS).response) == []
        page.get_by_role("button", name="Use the dark theme").click()
        assert serious(axe.run(page, options=CONTRAST).response) == []


def is_uncovered(row: Any) -> bool:
    return bool(
        row.evaluate(
            """row => {
                const [head, box, foot] = ["thead", "tr.v-active", "tfoot"].map((name) =>
                    row.closest("table").querySelector(name).getBoundingClientRect());
                return box.top >= head.bottom - 1 && box.bottom <= foot.top + 1;
            }"""
        )
    )
