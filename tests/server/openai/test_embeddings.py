"""POST /v1/embeddings: the official client, inputs, LLM's vectors, refusals, disconnects."""

import base64
import json
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import BadRequestError, OpenAI

from nanovllm import LLM
from nanovllm.engine.pooling import Pooler
from tests.support.serving import MODEL, RunningServer, loader, read_error, run_threads, wait_until

pytestmark = pytest.mark.both_backends

TEXTS = ["the end", "a cat", "漢字 and the rest of it", "the end"]


def post(server: RunningServer, **body: Any) -> httpx.Response:
    content = json.dumps(body).encode()
    return server.http.post(
        "/v1/embeddings", content=content, headers={"content-type": "application/json"}
    )


def embed(server: RunningServer, given: Any, **body: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = post(server, input=given, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def vectors(answer: dict[str, Any]) -> list[Any]:
    return [item["embedding"] for item in answer["data"]]


def test_the_official_client_gets_the_vectors_of_llm(client: OpenAI, llm: LLM) -> None:
    """By default it asks for base64 and decodes it."""
    expected = llm.embed(TEXTS, use_tqdm=False)
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [(item.object, item.index) for item in answer.data] == [
        ("embedding", i) for i in range(4)
    ]
    assert [item.embedding for item in answer.data] == [
        output.outputs.embedding for output in expected
    ]
    tokens = sum(len(output.prompt_token_ids) for output in expected)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_both_formats_hold_the_same_numbers(server: RunningServer) -> None:
    plain = vectors(embed(server, "the end", user="somebody"))[0]
    packed = base64.b64decode(
        vectors(embed(server, "the end", encoding_format="base64"))[0], validate=True
    )
    assert struct.unpack(f"<{len(plain)}f", packed) == tuple(plain)
    assert vectors(embed(server, "the end", encoding_format="float")) == [plain]
    assert sum(x * x for x in plain) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_token_ids_are_the_text_that_they_stand_for(
    server: RunningServer, llm: LLM, pooling: Any
) -> None:
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    expected = [output.outputs.embedding for output in llm.embed(TEXTS, pooling, use_tqdm=False)]
    assert expected[0] == expected[3] != expected[1]
    assert (
        vectors(embed(server, TEXTS, pooling=pooling))
        == vectors(embed(server, ids, pooling=pooling))
        == expected
    )
    assert (
        vectors(embed(server, TEXTS[1], pooling=pooling))
        == vectors(embed(server, ids[1], pooling=pooling))
        == expected[1:2]
    )


def test_poolings_differ(server: RunningServer) -> None:
    assert (
        vectors(embed(server, "the end"))
        == vectors(embed(server, "the end", pooling="last"))
        != vectors(embed(server, "the end", pooling="mean"))
    )


def test_the_answer_has_the_fields_of_openai(server: RunningServer) -> None:
    answer = embed(server, "the", model="alias")
    assert answer.keys() == {"id", "object", "created", "data", "model", "usage"}
    assert answer["id"].startswith("embd-")
    assert abs(time.time() - answer["created"]) < 60
    assert answer["model"] == "alias"
    assert [item.keys() for item in answer["data"]] == [{"object", "index", "embedding"}]
    assert answer["usage"].keys() == {"prompt_tokens", "total_tokens"}


def test_bits_are_the_same_beside_completions(server: RunningServer) -> None:
    alone = {
        (text, pooling): vectors(embed(server, text, pooling=pooling))
        for text in TEXTS
        for pooling in ("last", "mean")
    }

    def check(text: str, pooling: str) -> None:
        for _ in range(3):
            assert vectors(embed(server, text, pooling=pooling)) == alone[text, pooling]

    def write() -> None:
        server.complete("in the end", max_tokens=60, ignore_eos=True, n=2)

    calls: list[Callable[[], None]] = [partial(check, *key) for key in alone]
    run_threads([*calls, write, write, write])


def test_a_whole_context_is_embedded_and_one_token_more_is_refused(server: RunningServer) -> None:
    limit = server.engine.engine.max_model_len
    assert embed(server, [5] * limit, pooling="mean")["usage"]["prompt_tokens"] == limit
    error = read_error(post(server, input=[[5] * 3, [5] * (limit + 1)]), 400)
    assert error["param"] == "input"
    assert f"prompt 1: the prompt has {limit + 1} tokens, the limit is {limit}" in error["message"]


LONG_TEXT = "in the end, " * 30


@pytest.mark.parametrize("form", ["text", "ids"])
@pytest.mark.parametrize("count", [10, -1])
def test_vllm_truncation(client: OpenAI, llm: LLM, form: str, count: int) -> None:
    """At most 128 tokens are read, as by `vllm bench serve --backend openai-embeddings`."""
    ids = llm.tokenizer.encode(LONG_TEXT)
    given: Any = LONG_TEXT if form == "text" else ids
    extra = {"truncate_prompt_tokens": count}
    answer = client.embeddings.create(model=MODEL, input=given, extra_body=extra)
    kept = 128 if count == -1 else count
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == kept
    (expected,) = llm.embed([ids[:kept]], use_tqdm=False)
    assert answer.data[0].embedding == expected.outputs.embedding


def test_vllm_truncation_to_more_than_the_context(client: OpenAI) -> None:
    extra = {"truncate_prompt_tokens": 129}
    with pytest.raises(BadRequestError, match="the limit is 128") as caught:
        client.embeddings.create(model=MODEL, input=LONG_TEXT, extra_body=extra)
    assert caught.value.param == "truncate_prompt_tokens"


def test_either_end_may_be_cut_off(server: RunningServer, llm: LLM) -> None:
    ids = llm.tokenizer.encode(LONG_TEXT)
    for side, kept in (("left", ids[-10:]), ("right", ids[:10])):
        found = embed(server, LONG_TEXT, truncate_prompt_tokens=10, truncation_side=side)
        assert vectors(found) == vectors(embed(server, kept))
    bare = embed(server, "the", add_special_tokens=False)
    assert vectors(bare) == vectors(embed(server, "the"))


BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "dimensions": (
        {"dimensions": 16},
        "dimensions",
        "not supported: the embeddings of this model have 32 numbers",
    ),
    "truncated to 0": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
    "another side": ({"truncation_side": "middle"}, "truncation_side", "right"),
    "long texts to be truncated": (
        {"input": ["a " * 50000] * 11, "truncate_prompt_tokens": 5},
        "input",
        "1048576",
    ),
    "a longer text to be truncated": (
        {"input": ["a", "a" * 300_000], "truncate_prompt_tokens": 5},
        "input",
        "prompt 1: the prompt has 300000 bytes",
    ),
    "format": ({"encoding_format": "int8"}, "encoding_format", "base64"),
    "pooling": ({"pooling": "max"}, "pooling", "mean"),
    "no pooling": ({"pooling": ""}, "pooling", 'must be "last" or "mean"'),
    "empty text": ({"input": ""}, "input", "empty"),
    "empty list": ({"input": []}, "input", "empty"),
    "an empty text among others": ({"input": ["a", ""]}, "input", "prompt 1: the prompt is empty"),
    "an empty list among others": ({"input": [[1], []]}, "input", "prompt 1: the prompt is empty"),
    "a number": ({"input": 5}, "input", "5"),
    "mixed": ({"input": ["a", [1]]}, "input", "list"),
    "half a character": ({"input": "a\ud800"}, None, "surrogate"),
    "ids outside the vocabulary": ({"input": [1, 10**6]}, "input", "0 to 266"),
    "unknown field": ({"max_tokens": 5}, "max_tokens", "not supported"),
    "priority": ({"priority": 2**31}, "priority", "2147483648"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_is_named(server: RunningServer, name: str) -> None:
    body, param, part = BAD[name]
    error = read_error(post(server, **{"input": "the", **body}), 400)
    assert error["param"] == param
    assert part in error["message"]


def test_input_is_required_and_the_model_must_be_served(server: RunningServer) -> None:
    assert read_error(post(server), 400)["param"] == "input"
    assert "other" in read_error(post(server, input="the", model="other"), 404)["message"]
    error = read_error(post(server, **{"input": "the", **{f"f{i}": 1 for i in range(200)}}), 400)
    assert "201 fields" in error["message"]


def test_a_network_that_is_not_a_number_is_a_500(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pooler.add
    monkeypatch.setattr(
        Pooler, "add", lambda self, hidden: real(self, np.full_like(hidden, np.nan))
    )
    assert "not a number" in read_error(post(server, input="the"), 500)["message"]
    monkeypatch.undo()
    embed(server, "the")


@pytest.fixture(scope="module")
def sluggish(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server whose prompts take long to read, and which has room for three."""
    with RunningServer(
        loader(tiny_model, step_s=0.05, max_num_batched_tokens=4, max_num_seqs=2),
        max_queued_requests=3,
    ) as running:
        yield running


def test_embeddings_have_their_place_in_the_queue(sluggish: RunningServer) -> None:
    assert (
        "4 choices at once, the limit is 3"
        in read_error(post(sluggish, input=["a"] * 4), 400)["message"]
    )

    def wait_and_ask() -> httpx.Response:
        wait_until(
            lambda: (
                sluggish.samples()["num_requests_running"]
                + sluggish.samples()["num_requests_waiting"]
                == 3
            )
        )
        return post(sluggish, input="the")

    answer, refused = run_threads(
        [lambda: post(sluggish, input=[[7] * 20] * 3, pooling="mean"), wait_and_ask]
    )
    assert answer.status_code == 200
    assert read_error(refused, 429)["type"] == "RateLimitError"
    assert refused.headers["retry-after"]
    wait_until(sluggish.is_idle)
    embed(sluggish, ["a"] * 3)


def test_a_client_that_goes_away_ends_its_requests(sluggish: RunningServer) -> None:
    before = sluggish.samples()["prompt_tokens_total"]
    with pytest.raises(httpx.ReadTimeout):
        sluggish.http.post(
            "/v1/embeddings", json={"input": [[7] * 120] * 3, "pooling": "mean"}, timeout=0.3
        )
    wait_until(sluggish.is_idle)
    assert sluggish.samples()["prompt_tokens_total"] - before < 3 * 120, "it was read for nobody"
    embed(sluggish, ["a"] * 3)
