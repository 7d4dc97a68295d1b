"""Attention, logit lens and embeddings in Chromium: the views show what the model computes."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nanovllm.inspection import responses
from nanovllm.inspection.observe import InspectedModel
from tests.reference.cases import attention_prompt, options_of
from tests.support.browser import is_beside, open_page
from tests.support.checkpoints import write_checkpoint, write_tokenizer
from tests.support.serving import RunningServer, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

RECORDED = Path(__file__).parents[2] / "reference" / "recorded_attention.npz"
CASE = "plain"
SMALLEST_CONTEXT = 64  # the default of `nanovllm train`, where a token can be a character
MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
PROMPT = "the old man said to the young man: the end"


def answer_for_case(page: "Page", folder: Path) -> None:
    """Answer /v1/inspect with what the recorded model computes of the recorded prompt."""
    write_checkpoint(folder, **options_of(CASE))
    write_tokenizer(folder)
    model = InspectedModel.load(folder)

    def answer(route: "Route") -> None:
        name = route.request.url.rsplit("/", 1)[1]
        body: Any = route.request.post_data_json
        arguments = {**body, "prompt": attention_prompt().tolist()}
        route.fulfill(json=responses.run(model, name, arguments))

    page.route("**/v1/inspect/*", answer)


def show(page: "Page", prompt: str, button: str) -> None:
    """Show a prompt; wait for its tokens, since the view first shows an example."""
    page.locator("[role=tabpanel]:not([hidden]) .v-output:not([aria-busy])").wait_for()
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name=button).click()
    page.wait_for_function(
        "prompt => [...document.querySelectorAll('[role=tabpanel]:not([hidden]) .v-output')]"
        ".some(output => output.dataset.prompt === prompt && !output.ariaBusy)",
        arg=prompt,
    )


def test_weights_on_the_page_equal_those_of_transformers(
    browser: "Browser", server: RunningServer, tmp_path: Path
) -> None:
    with np.load(RECORDED, allow_pickle=False) as arrays:
        recorded = arrays[CASE]
    layers, heads, size, _ = recorded.shape
    with open_page(browser, server.url) as page:
        answer_for_case(page, tmp_path)
        page.get_by_role("tab", name="Attention").click()
        page.locator(".v-map-canvas").wait_for()
        packed = page.evaluate(
            "async (layers) => Promise.all(layers.map(async (layer) =>"
            " [...await document.querySelector('.v-attention').weightsOf(layer)]))",
            list(range(layers)),
        )
        weights = np.zeros_like(recorded)
        packed = np.asarray(packed, dtype=np.float32).reshape(layers, heads, -1)
        queries, keys = np.tril_indices(size)
        weights[..., queries, keys] = packed
        np.testing.assert_allclose(weights, recorded, atol=1e-5, rtol=0)
        np.testing.assert_allclose(weights.sum(axis=3), 1, atol=1e-5)

        diagonals = recorded.diagonal(offset=-1, axis1=2, axis2=3)[..., 1:].mean(axis=2)
        layer, head = np.unravel_index(diagonals.argmax(), diagonals.shape)
        card = page.get_by_role("button", name="Previous token").locator("visible=true")
        assert f"Layer {layer}, head {head}" in (card.text_content() or "")
        assert page.get_by_role("heading", name=f"Layer {layer}, head {head}").is_visible()
        page.locator(".v-head[tabindex='0']").focus()
        page.keyboard.press("ArrowUp" if layer else "ArrowDown")
        focused = page.evaluate("document.activeElement.ariaLabel")
        assert focused.startswith(f"Layer {layer - 1 if layer else 1}, head {head}")
        page.locator(".v-map-canvas").focus()
        key = recorded[layer, head, size - 1].argmax()
        page.keyboard.press("ArrowUp")
        shown = f"{recorded[layer, head, -2, key]:.4f}"
        page.locator(".v-reading strong", has_text=shown).wait_for()

        largest = page.get_by_text("Largest weights of this row")
        kept = largest.text_content()
        labels = page.locator(".v-text-card .v-token").evaluate_all(
            "tokens => tokens.map((t) => t.title)"
        )
        assert len(labels) == size
        box = page.locator(".v-map-canvas").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] - 3)
        row = recorded[layer, head, -1]
        expected = [f"{weight:.4f}" for weight in np.sort(row)[::-1][:5]]
        page.wait_for_function(
            "kept => !document.querySelector('.v-text-card').textContent.includes(kept)", arg=kept
        )
        assert all(weight in (largest.text_content() or "") for weight in expected)
        page.mouse.move(0, 0)
        page.get_by_text(kept or "", exact=True).wait_for()


def test_the_logit_lens_marks_where_the_probability_of_the_prompt_collapses(
    browser: "Browser", server: RunningServer
) -> None:
    tokens = server.http.post("/v1/inspect/logit_lens", json={"prompt": PROMPT}).json()
    of_next = [cell["p_of_next"] for cell in tokens["cells"][-1][:-1]]
    lowest = int(np.argmin(of_next))
    with open_page(browser, f"{server.url}/#lens") as page:
        show(page, PROMPT, "Show logit lens")
        table = page.locator(".v-lens-scroll")
        assert table.evaluate("table => table.scrollLeft") == 0, "it opens at the first token"
        page.locator("td").first.press("End")
        last = len(of_next)
        assert page.evaluate("Number(document.activeElement.dataset.position)") == last
        scrolled = "table => table.scrollLeft + table.clientWidth - table.scrollWidth"
        assert table.evaluate(scrolled) == pytest.approx(0, abs=4)
        page.keyboard.press("Home")
        assert page.evaluate("Number(document.activeElement.dataset.position)") == 0
        first = page.locator(".v-surprise").first
        assert f"position {lowest + 1} (from 0)" in (first.text_content() or "")
        first.click()
        chosen = page.locator(".v-output-row td").nth(lowest)
        assert chosen.evaluate("cell => cell === document.activeElement")
        page.keyboard.press("Enter")
        details = page.get_by_role("dialog", name="Most likely next tokens")
        assert details.locator("li").count() == 5
        assert is_beside(details, table)
        assert f"position {lowest}" in (details.text_content() or "")
        page.keyboard.press("Escape")
        assert chosen.evaluate("cell => cell === document.activeElement")
        chosen.click()
        page.keyboard.press("ArrowLeft" if lowest else "ArrowRight")
        assert details.count() == 0
        moved = page.evaluate("Number(document.activeElement.dataset.position)")
        assert moved == (lowest - 1 if lowest else 1)
        page.get_by_label("Rank of next").check(force=True)
        page.get_by_text("rank of the token that follows").wait_for()
        page.get_by_role("textbox", name="Prompt").fill("")
        page.get_by_role("button", name="Show logit lens").click()
        page.get_by_role("alert").get_by_text("The prompt is empty").wait_for()


@pytest.mark.parametrize(("view", "action"), [("attention", "Show attention"), ("lens", "Show lo")])
def test_parts_can_be_switched_off(
    browser: "Browser", server: RunningServer, view: str, action: str
) -> None:
    off = [{"layer": 0, "kind": "ffn"}, {"layer": 1, "kind": "head", "head": 2}]
    answer = server.http.post("/v1/inspect/ablation", json={"prompt": PROMPT, "off": off}).json()
    whole, ablated = (answer[name]["loss"] for name in ("whole", "ablated"))
    measured = server.http.post("/v1/inspect/ablation_map", json={"prompt": PROMPT}).json()
    with open_page(browser, f"{server.url}/#{view}") as page:
        show(page, PROMPT, action)
        card = page.locator(".v-ablation").locator("visible=true")
        lists = card.locator(".share-list")
        card.get_by_text(f"Loss {whole:.3f} nats per token").wait_for()
        assert lists.count() == 1
        card.get_by_role("button", name="layer 0, feed-forward").click()
        card.get_by_role("button", name="layer 1, head 2").click()
        card.get_by_text(f"Loss {whole:.3f} → {ablated:.3f} nats per token").wait_for()
        card.get_by_text("Off: layer 0, feed-forward · layer 1, head 2").wait_for()
        for position in (len(answer["tokens"]) - 1, 3):
            card.locator(".v-token").nth(position).click()
            for index, name in enumerate(("whole", "ablated")):
                best = answer[name]["cells"][position]["top"][0]
                shown = lists.nth(index).locator("li").first.text_content() or ""
                assert f"{100 * best['p']:.3g}"[:3] in shown

        card.get_by_role("button", name="Measure each part").click()
        part = measured["parts"][5]
        change = f"{part['loss'] - measured['loss']:+.4f}".replace("-", "\u2212")
        pressed = card.get_by_role("button", name=f"layer 0, feed-forward: loss {change} without")
        pressed.wait_for()
        assert pressed.get_attribute("aria-pressed") == "true"
        pressed.press("ArrowDown")
        focused = page.evaluate("document.activeElement.ariaLabel")
        assert focused.startswith("layer 1, feed-forward")
        card.get_by_role("button", name="Switch all on").click()
        card.get_by_text("Nothing is off.").wait_for()
        assert card.locator(".v-part[aria-pressed=true]").count() == 0
        assert lists.count() == 1


def test_a_click_counts_while_the_page_moves(browser: "Browser", server: RunningServer) -> None:
    held: list[Route] = []

    def hold(route: "Route") -> None:
        held.append(route)

    with open_page(browser, server.url) as page:
        page.route("**/v1/inspect/attention_head", hold)
        page.get_by_role("tab", name="Attention").click()
        show(page, PROMPT, "Show attention")
        card = page.locator(".v-ablation").locator("visible=true")
        first, second = (
            card.get_by_role("button", name=f"layer {layer}, feed-forward") for layer in (0, 1)
        )
        first.click()
        second.hover()
        before = second.bounding_box()
        page.mouse.down()
        for route in held:
            route.continue_()
        page.locator(".v-row-table").wait_for()
        assert second.bounding_box() != before, "the row above is larger now"
        page.mouse.up()
        card.get_by_text("Off: layer 0, feed-forward · layer 1, feed-forward").wait_for()


def test_markup_in_prompts_is_shown_as_text(browser: "Browser", server: RunningServer) -> None:
    with open_page(browser, f"{server.url}/#attention") as page:
        show(page, MARKUP, "Show attention")
        strip = page.locator("#panel-attention .v-text-card .v-strip").text_content() or ""
        assert strip.replace("␣", " ") == MARKUP
        page.get_by_role("tab", name="Logit lens").click()
        show(page, MARKUP, "Show logit lens")
        shown = page.locator("#panel-lens thead th").all_text_contents()
        assert "".join(shown[1:]).replace("␣", " ") == MARKUP
        assert page.locator("main img, main b").count() == 0


def test_an_induction_head_is_named_only_for_a_prompt_that_repeats(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, f"{server.url}/#attention") as page:
        prompt = page.get_by_role("textbox", name="Prompt")
        assert len(prompt.input_value()) <= SMALLEST_CONTEXT
        show(page, "abc", "Show attention")
        short = page.locator(".v-finder", has_text="The prompt is too short")
        assert short.count() == 3
        show(page, "abcab", "Show attention")
        assert short.count() == 0
        card = page.locator(".v-finder", has_text="Induction")
        assert "this one repeats 2 tokens, fewer than 5." in (card.text_content() or "")
        page.locator("summary", has_text="Statistics of all heads").click()
        column = page.locator("#panel-attention .v-table tbody td:nth-child(6)")
        assert set(column.all_text_contents()) == {"\u2013"}
        card.get_by_role("button", name="Show an example").click()
        page.locator("button.v-finder", has_text="Induction").wait_for()
        assert len(prompt.input_value()) <= SMALLEST_CONTEXT
        assert "%" in (column.first.text_content() or "")


@pytest.mark.parametrize("methods", [["pca"], ["pca", "tsne"]])
def test_projections_are_offered_where_the_server_can_compute_them(
    browser: "Browser", server: RunningServer, methods: list[str]
) -> None:
    with open_page(browser, server.url) as page:
        page.route("**/v1/inspect/embeddings*", lambda route: offer(route, methods))
        page.get_by_role("tab", name="Embeddings").click()
        page.get_by_text("of the variance; the picture").wait_for()
        assert page.get_by_label("t-SNE").count() == len(methods) - 1


def offer(route: "Route", methods: list[str]) -> None:
    """Answer with the server's projection, and say that it can compute these."""
    response = route.fetch()
    route.fulfill(response=response, json={**response.json(), "methods": methods})


def test_a_few_tokens_far_out_do_not_squeeze_the_others(
    browser: "Browser", server: RunningServer
) -> None:
    with open_page(browser, server.url) as page:

        def stretch(route: "Route") -> None:
            body = route.fetch().json()
            body["points"][7]["x"] = 1000.0
            route.fulfill(json=body)

        page.route("**/v1/inspect/embeddings*", stretch)
        page.get_by_role("tab", name="Embeddings").click()
        page.get_by_text("1 token outside the picture: rings at its edge.").wait_for()


def test_embeddings_are_searched_by_text(browser: "Browser", server: RunningServer) -> None:
    held: list[Route] = []

    def hold(route: "Route") -> None:
        held.append(route)

    with open_page(browser, f"{server.url}/#embeddings") as page:
        explained = page.get_by_text("of the variance; the picture")
        explained.wait_for()
        page.route("**/v1/inspect/embeddings?method=pca*", lambda r: offer(r, ["pca", "tsne"]))
        page.reload()
        explained.wait_for()
        page.route("**/v1/inspect/embeddings?method=tsne*", hold)
        page.get_by_label("t-SNE").check(force=True)
        page.get_by_text("Computing t-SNE, some seconds").wait_for()
        wait_until(lambda: explained.count() == 0 and len(held) == 1)
        assert page.locator(".v-outdated").count() == 1
        page.get_by_label("PCA").check(force=True)
        explained.wait_for()
        assert page.locator(".v-outdated").count() == 0
        held[0].fulfill(json={})
        assert explained.is_visible()
        page.get_by_label("Search tokens").fill("the")
        result = page.locator(".v-results .v-result").first
        result.wait_for()
        token_id = int((result.get_attribute("title") or "").rsplit(" ", 1)[1])
        result.click()
        nearest = page.locator(".share-list li")
        nearest.nth(9).wait_for()
        response = server.http.get(f"/v1/inspect/neighbors?token={token_id}&count=10")
        expected = [f"{one['cosine']:.3f}" for one in json.loads(response.text)["neighbors"]]
        assert nearest.locator("span:last-child").all_text_contents() == expected

        page.get_by_text("tokens of the vocabulary are shown").wait_for()
        for name in ("\\xFF", "\\x1F"):  # no character, and one that is not visible
            page.get_by_label("Search tokens").fill(name)
            page.locator(".v-results .v-result", has_text=name).wait_for()


def test_the_map_of_a_long_prompt_fits_its_box(browser: "Browser", server: RunningServer) -> None:
    size = 320
    kinds = ("previous_token", "first_token", "self", "distance", "entropy")
    head = {"layer": 0, "head": 0, **dict.fromkeys(kinds, 0.5), "induction": None}
    weights = base64.b64encode(bytes(size * (size + 1) // 2 * 4)).decode()
    answer = {
        "tokens": [{"id": index, "text": "a"} for index in range(size)],
        "heads": [head],
        "dtype": "float32",
        "weights": weights,
    }
    with open_page(browser, server.url) as page:
        page.set_viewport_size({"width": 1280, "height": 800})
        page.route("**/v1/inspect/*", lambda route: route.fulfill(json=answer))
        page.get_by_role("tab", name="Attention").click()
        page.locator(".v-reading strong", has_text="0.0000").wait_for()
        page.wait_for_function("document.querySelector('.v-map-canvas').clientWidth > 320")
        assert (
            page.locator(".v-map-frame").evaluate("box => box.scrollWidth - box.clientWidth") == 0
        )


def test_errors_of_the_server_are_shown(browser: "Browser", server: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": "a" * 600}
    message = server.http.post("/v1/inspect/overview", json=body).json()["error"]["message"]
    with open_page(browser, f"{server.url}/#attention", expected_errors=1) as page:
        page.locator(".v-output:not([aria-busy]) .v-attention").wait_for()
        page.get_by_role("textbox", name="Prompt").fill(body["prompt"])
        page.get_by_role("button", name="Show attention").click()
        alert = page.get_by_role("alert")
        alert.wait_for()
        assert alert.text_content() == message
