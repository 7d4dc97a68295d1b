"""POST and GET /v1/inspect/*."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from nanovllm.inspection.worker_process import InspectionWorker
from nanovllm.server.http import worker_pools
from tests.support.serving import TIMEOUT_S, RunningServer, read_error, run_threads

PROMPT = "the cat in the hall"
PATHS = ("attention", "attention_head", "overview", "logit_lens", "ablation", "ablation_map")
PART = {"layer": 0, "kind": "head"}


def post(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(f"/v1/inspect/{path}", json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_attention_weights_are_rows_that_sum_to_one(server: RunningServer) -> None:
    body = post(server, "attention", prompt=PROMPT)
    size = len(body["tokens"])
    assert "".join(token["text"] for token in body["tokens"]) == PROMPT
    weights = np.frombuffer(base64.b64decode(body["weights"]), dtype="<f4")
    weights = weights.reshape(body["layers"], body["heads"], size * (size + 1) // 2)
    ends = np.cumsum(np.arange(1, size + 1))
    rows = np.add.reduceat(weights, ends - np.arange(1, size + 1), axis=2)
    np.testing.assert_allclose(rows, 1, atol=1e-5)
    one = post(server, "attention", prompt=[token["id"] for token in body["tokens"]], layer=1)
    assert one["tokens"] == body["tokens"]
    np.testing.assert_array_equal(
        np.frombuffer(base64.b64decode(one["weights"]), dtype="<f4"), weights[1].ravel()
    )


def test_a_head_has_its_query_keys_values_and_scores(server: RunningServer) -> None:
    body = post(server, "attention_head", prompt=PROMPT, layer=1, head=2, query=4)
    assert (body["layer"], body["head"], body["query"]) == (1, 2, 4)
    scores = body["scale"] * np.array(body["k"]) @ body["q"]
    np.testing.assert_allclose(body["scores"], scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(body["weights"]) @ body["v"], body["output"], atol=1e-5)
    assert len(body["k"]) == len(body["v"]) == len(body["weights"]) == 5
    last = post(server, "attention_head", prompt=PROMPT)
    assert (last["layer"], last["head"]) == (0, 0)
    assert last["query"] == len(last["tokens"]) - 1


def test_parts_that_are_switched_off_change_the_predictions(server: RunningServer) -> None:
    lens = post(server, "logit_lens", prompt=PROMPT, top=3)
    body = post(server, "ablation", prompt=PROMPT, top=3)
    assert body["whole"]["cells"] == body["ablated"]["cells"] == lens["cells"][-1]
    of_next = [cell["p_of_next"] for cell in lens["cells"][-1][:-1]]
    assert body["whole"]["loss"] == pytest.approx(-np.log(of_next).mean(), rel=1e-5)
    off = [{"layer": 1, "kind": "head", "head": 2}, {"layer": 0, "kind": "block", "head": None}]
    changed = post(server, "ablation", prompt=PROMPT, off=off)
    assert (changed["off"], changed["whole"]["loss"]) == (off, body["whole"]["loss"])
    assert changed["ablated"]["loss"] != body["whole"]["loss"]
    for part in post(server, "ablation_map", prompt=PROMPT)["parts"]:
        loss = part.pop("loss")
        alone = post(server, "ablation", prompt=PROMPT, off=[part])
        assert alone["ablated"]["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_part_of_a_character_has_its_bytes(server: RunningServer) -> None:
    tokens = post(server, "overview", prompt="é\ufffda")["tokens"]
    assert [token.get("bytes") for token in tokens] == ["c3", "a9", "ef", "bf", "bd", None]
    assert {token["text"] for token in tokens} == {"\ufffd", "a"}


def test_the_overview_describes_every_head(server: RunningServer) -> None:
    heads = post(server, "overview", prompt=PROMPT)["heads"]
    assert [(head["layer"], head["head"]) for head in heads] == [
        (layer, head) for layer in range(2) for head in range(4)
    ]
    assert all(0 <= head["previous_token"] <= 1 for head in heads)


def test_the_last_row_of_the_lens_has_the_probabilities_of_completions(
    server: RunningServer,
) -> None:
    lens = post(server, "logit_lens", prompt=PROMPT, top=3)
    assert len(lens["cells"]) == len(lens["layers"]) == 3
    settings = {"max_tokens": 1, "echo": True, "return_tokens_as_token_ids": True}
    logprobs = server.complete(PROMPT, logprobs=3, **settings)["choices"][0]["logprobs"]
    last = lens["cells"][-1]
    for position, cell in enumerate(last):
        served = logprobs["top_logprobs"][position + 1]
        found = [np.log(token["p"]) for token in cell["top"]]
        expected = [served[f"token_id:{token['id']}"] for token in cell["top"]]
        np.testing.assert_allclose(found, expected, atol=2e-4)
    next_logprobs = [np.log(cell["p_of_next"]) for cell in last[:-1]]
    np.testing.assert_allclose(next_logprobs, logprobs["token_logprobs"][1:-1], atol=2e-4)
    assert last[-1]["rank_of_next"] is None


def test_embeddings_and_neighbors_of_the_vocabulary(server: RunningServer) -> None:
    url = "/v1/inspect/embeddings?limit=20"
    body = server.http.get(url).json()
    assert [point["id"] for point in body["points"]] == list(range(20))
    assert body["vocab"] == 267
    assert server.http.get(url).json() == body
    by_text = server.http.get("/v1/inspect/neighbors", params={"text": " the", "count": 3}).json()
    by_id = server.http.get(f"/v1/inspect/neighbors?count=3&token={by_text['token']['id']}").json()
    assert by_id == by_text
    assert len(by_id["neighbors"]) == 3


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("attention", {}, "prompt", "required"),
        ("attention", {"prompt": ["the", "cat"]}, "prompt", "up to 512 token ids"),
        ("attention", {"prompt": "a" * 200}, "prompt", "200 tokens, the limit is 128; shorten"),
        ("attention", {"prompt": "a", "layer": 2}, "layer", "layers 0 to 1"),
        ("attention_head", {"prompt": "a", "head": 4}, "head", "heads 0 to 3"),
        ("attention_head", {"prompt": "a", "query": 1}, "query", "positions 0 to 0"),
        ("attention_head", {"prompt": "a", "query": -1}, "query", "0"),
        ("overview", {"prompt": "a", "layer": 0}, "layer", "layer"),
        ("logit_lens", {"prompt": "a", "top": 21}, "top", "20"),
        ("ablation", {"prompt": "a", "top": 21}, "top", "20"),
        ("ablation", {"prompt": "a", "off": PART}, "off", "list"),
        ("ablation", {"prompt": "a", "off": [PART | {"layer": 2}]}, "off", "off.0.layer is 2"),
        ("ablation", {"prompt": "a", "off": [PART | {"head": 4}]}, "off", "heads 0 to 3"),
        ("ablation", {"prompt": "a", "off": [PART]}, "off", "'head' without a head"),
        (
            "ablation",
            {"prompt": "a", "off": [PART | {"kind": "ffn", "head": 1}]},
            "off",
            "with a h",
        ),
        ("ablation", {"prompt": "a", "off": [PART | {"kind": "neck"}]}, "off", 'or "block"'),
        ("ablation", {"prompt": "a", "off": [PART | {"layer": -1}]}, "off", "0"),
        ("ablation", {"prompt": "a", "off": [PART] * 2049}, "off", "limit is 2048"),
        ("ablation_map", {"prompt": "a", "off": []}, "off", "off"),
    ],
)
def test_an_invalid_body_is_refused(
    server: RunningServer, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    error = read_error(server.http.post(f"/v1/inspect/{path}", json=body), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("embeddings?limit=9999", "limit"),
        ("embeddings?limit=many", "limit"),
        ("embeddings?method=umap", "method"),
        ("neighbors", "token"),
        ("neighbors?token=1&text=a", "token"),
        ("neighbors?token=999", "token"),
        ("neighbors?token=999999999999", "token"),
        ("neighbors?text=several+tokens", "text"),
    ],
)
def test_an_invalid_query_is_refused(server: RunningServer, query: str, param: str) -> None:
    assert read_error(server.http.get(f"/v1/inspect/{query}"), 400)["param"] == param


def test_pages_of_other_origins_are_refused(server: RunningServer) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    for path in PATHS:
        url, body = f"/v1/inspect/{path}", {"prompt": PROMPT}
        assert server.http.post(url, json=body, headers=own).status_code == 200
        for origin in (
            "https://evil.example",
            "null",
            server.url.replace("127.0.0.1", "localhost"),
        ):
            headers = {"origin": origin}
            error = read_error(server.http.post(url, json=body, headers=headers), 403)
            assert "--allowed-origins" in error["message"]
    for path in ("embeddings?limit=5", "neighbors?token=1"):
        url = f"/v1/inspect/{path}"
        assert server.http.get(url, headers={"sec-fetch-site": "none"}).status_code == 200
        for site in ("cross-site", "same-site"):
            read_error(server.http.get(url, headers={"sec-fetch-site": site}), 403)


def test_more_jobs_than_the_queue_holds_are_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": list(range(128)), "top": 20}

    def status() -> int:
        return server.http.post("/v1/inspect/logit_lens", json=body).status_code

    with ThreadPoolExecutor(16) as pool:
        statuses = [future.result() for future in [pool.submit(status) for _ in range(16)]]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= worker_pools.MAX_WAITING_INSPECTIONS


def test_a_query_beyond_the_queue_is_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GET has no body to be read, so its disconnect is awaited from the first message on."""
    has_begun, may_end = threading.Event(), threading.Event()
    run = InspectionWorker.run

    def blocked(*arguments: Any) -> bytes:
        has_begun.set()
        may_end.wait(TIMEOUT_S)
        return run(*arguments)

    def status(number: int) -> int:
        if number:
            has_begun.wait(TIMEOUT_S)
        try:
            return server.http.get(f"/v1/inspect/neighbors?token={number}").status_code
        finally:
            if len(refused) < num_refused - 1:
                refused.append(number)
            else:
                may_end.set()

    num_refused, refused = 3, list[int]()
    monkeypatch.setattr(InspectionWorker, "run", blocked)
    num_kept = 1 + worker_pools.MAX_WAITING_INSPECTIONS
    statuses = run_threads([partial(status, number) for number in range(num_kept + num_refused)])
    assert sorted(statuses) == [200] * num_kept + [429] * num_refused
