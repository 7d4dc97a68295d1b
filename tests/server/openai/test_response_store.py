"""Stored responses: bounds, clients, and requests that refer to them."""

from typing import Any
from unittest.mock import Mock

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from nanovllm import LLM, SamplingParams
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.errors import InvalidRequestError
from nanovllm.server.openai.endpoint import prepare
from nanovllm.server.openai.response_schemas import ResponsesRequest
from nanovllm.server.openai.response_store import (
    MAX_RESPONSE_BYTES,
    ClientResponses,
    ResponseStore,
    StoredResponse,
)
from nanovllm.server.openai.responses import RESPONSES, resolve_references
from tests.support.chats import prompt_of
from tests.support.serving import MODEL, RunningServer, read_error

SETTINGS: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 5}
QUESTION = {"role": "user", "content": "the end"}
AGAIN = {"role": "user", "content": "a"}


def response_of(num_bytes: int) -> StoredResponse:
    empty = StoredResponse(b"", b"[]")
    return StoredResponse(b" " * (num_bytes - empty.num_bytes), b"[]")


def test_the_response_that_was_used_longest_ago_is_dropped() -> None:
    for store in (ResponseStore(max_responses=2), ResponseStore(max_bytes=2500)):
        store.add("", "a", response_of(1000))
        store.add("", "b", response_of(1000))
        assert store.find("", "a") == response_of(1000)
        store.add("", "c", response_of(1000))
        assert [name for name in "abc" if store.find("", name)] == ["a", "c"]
        assert store.remove("", "a")
        assert not store.remove("", "a")
        store.add("", "d", response_of(1000))
        assert [name for name in "abcd" if store.find("", name)] == ["c", "d"]


def test_a_response_that_is_larger_than_the_store_is_not_kept() -> None:
    store = ResponseStore(max_bytes=2500)
    store.add("", "a", response_of(1000))
    store.add("", "b", response_of(2501))
    assert store.find("", "b") is None
    assert store.find("", "a") is not None


@pytest.mark.parametrize(("characters", "is_kept"), [(1000, True), (MAX_RESPONSE_BYTES, False)])
def test_a_large_response_is_not_kept_and_says_so(
    llm: LLM, characters: int, *, is_kept: bool
) -> None:
    """White space that the template drops would make a conversation of megabytes."""
    template = ChatTemplate("{{ messages[0].content | trim }}", "the test's")
    stored = ClientResponses(ResponseStore())
    body = ResponsesRequest.model_validate({**SETTINGS, "input": "a" + " " * characters})
    renderer, _ = prepare(RESPONSES, body, llm.engine, template, MODEL, stored=stored)
    response = renderer.body(llm.generate(["a"], SamplingParams(max_tokens=2)))
    assert response["store"] is is_kept
    assert (stored.conversation(response["id"]) is not None) is is_kept
    template.close()


def test_a_conversation_is_read_once_for_many_references(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore()
    store.add("", "resp_1", StoredResponse(b"", b'[{"role":"assistant","content":"a"}]'))
    stored = ClientResponses(store)
    find = Mock(side_effect=store.find)
    monkeypatch.setattr(store, "find", find)
    reference = {"type": "item_reference", "id": "msg_1"}
    body = ResponsesRequest.model_validate({"input": [reference] * 100})
    assert len(resolve_references(body, stored).messages) == 100
    assert find.call_count == 1


def test_clients_find_their_own_responses_and_drop_no_others() -> None:
    store = ResponseStore(max_bytes=4500)
    store.add("one", "a", response_of(1000))
    for name in "bcdefg":
        store.add("two", name, response_of(1000))
    assert store.find("one", "a") is not None
    assert [name for name in "bcdefg" if store.find("two", name)] == ["e", "f", "g"]
    assert store.find("two", "a") is None
    assert store.find("three", "a") is None
    assert not store.remove("two", "a")
    assert ClientResponses(store, "two").conversation("a") is None


def test_clients_without_responses_are_forgotten() -> None:
    """Their keys may be long gone."""
    store = ResponseStore(max_responses=1)
    for client in ("one", "two", "three"):
        store.add(client, "a", response_of(1000))
    assert list(store._held_bytes) == ["three"]  # noqa: SLF001
    assert store.remove("three", "a")
    assert not store._held_bytes  # noqa: SLF001


@pytest.mark.parametrize("streams", [False, True])
def test_a_stored_response_is_continued_as_if_the_client_had_sent_it_all(
    chat_client: OpenAI, server: RunningServer, llm: LLM, *, streams: bool
) -> None:
    """The items are those that @ai-sdk/openai sends in a second turn."""
    question: Any = {
        "role": "user",
        "content": [{"type": "input_text", "text": QUESTION["content"]}],
    }
    if streams:
        *_, last = chat_client.responses.create(**SETTINGS, input=[question], stream=True)
        assert last.type == "response.incomplete"
        first = last.response
    else:
        first = chat_client.responses.create(**SETTINGS, input=[question], store=True)
    answer = {"role": "assistant", "content": first.output_text}
    spelled: Any = [QUESTION, answer, AGAIN]
    expected = chat_client.responses.create(
        **SETTINGS, input=spelled, store=False, instructions="in"
    )
    assert (first.to_dict()["store"], expected.to_dict()["store"]) == (True, False)
    reference = {"type": "item_reference", "id": first.output[0].id}
    again = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
    for body in (
        {"input": [question, reference, again]},
        {"previous_response_id": first.id, "input": [again]},
        {"previous_response_id": first.id, "input": "a"},
    ):
        answered = server.http.post(
            "/v1/responses", json={**SETTINGS, **body, "instructions": "in"}
        )
        assert answered.status_code == 200, answered.text
        second = answered.json()
        assert second["usage"]["input_tokens"] == expected.usage.input_tokens
        assert second["output"][0]["content"][0]["text"] == expected.output_text
        assert second["previous_response_id"] == body.get("previous_response_id")
        third = chat_client.responses.create(
            **SETTINGS, input="x", previous_response_id=second["id"]
        )
        turns = [QUESTION, answer, AGAIN, {**answer, "content": expected.output_text}]
        prompt = prompt_of(llm, [*turns, {"role": "user", "content": "x"}])
        assert third.usage is not None
        assert third.usage.input_tokens == len(prompt), "instructions are not a part of it"


def test_the_official_client_retrieves_and_deletes_a_response(chat_client: OpenAI) -> None:
    created = chat_client.responses.create(**SETTINGS, input="the", metadata={"a": "b"})
    assert chat_client.responses.retrieve(created.id) == created
    chat_client.responses.delete(created.id)
    with pytest.raises(NotFoundError, match="never stored, or dropped"):
        chat_client.responses.retrieve(created.id)
    with pytest.raises(NotFoundError):
        chat_client.responses.delete(created.id)
    with pytest.raises(BadRequestError, match="store: false"):
        chat_client.responses.create(**SETTINGS, input="a", previous_response_id=created.id)


def test_a_response_that_must_not_be_stored_is_not_found(
    chat_client: OpenAI, server: RunningServer
) -> None:
    created = chat_client.responses.create(**SETTINGS, input="the", store=False)
    error = read_error(server.http.get(f"/v1/responses/{created.id}"), 404)
    assert (error["type"], error["param"]) == ("NotFoundError", "response_id")
    reference = {"type": "item_reference", "id": created.output[0].id}
    for body, param in (
        ({"input": [reference]}, "input"),
        ({"input": [{**reference, "id": "rs_1"}]}, "input"),
        ({"input": "a", "previous_response_id": created.id}, "previous_response_id"),
    ):
        error = read_error(server.http.post("/v1/responses", json=body), 400)
        assert error["param"] == param
        assert "send the whole conversation in input, with store: false" in error["message"]
        assert "was dropped, or never stored" in error["message"]


def test_without_a_store_references_are_refused_and_store_is_accepted(
    llm: LLM, server: RunningServer
) -> None:
    template = server.settings.chat_template
    body = ResponsesRequest.model_validate({"input": "a", "previous_response_id": "resp_1"})
    with pytest.raises(InvalidRequestError, match=r"responses are not kept.*store: false"):
        prepare(RESPONSES, body, llm.engine, template, MODEL)
    stored = ResponsesRequest.model_validate({"input": "a", "store": True})
    renderer, _ = prepare(RESPONSES, stored, llm.engine, template, MODEL)
    event = renderer.begin()
    assert b'"store":false' in event


def test_the_inspector_shows_no_id_that_gives_access_to_a_response(
    server: RunningServer,
) -> None:
    """A server without keys has one store for all, who see the ids of the engine's requests."""
    http = server.http
    http.get("/v1/engine/steps")  # steps are recorded from now on
    created = http.post("/v1/responses", json={**SETTINGS, "input": "the"}).json()
    assert http.get(f"/v1/responses/{created['id']}").json() == created
    steps = http.get("/v1/engine/steps").text
    assert "responses-" in steps, steps
    assert created["id"].removeprefix("resp_") not in steps


def test_a_conversation_has_a_limit(server: RunningServer, llm: LLM) -> None:
    store = ResponseStore()
    many = b"[" + b",".join([b'{"role":"user","content":"a"}'] * 2048) + b"]"
    store.add("", "resp_1", StoredResponse(b"", many))
    body = ResponsesRequest.model_validate({"input": "a", "previous_response_id": "resp_1"})
    with pytest.raises(InvalidRequestError, match="2049 messages, the limit is 2048"):
        prepare(
            RESPONSES, body, llm.engine, server.settings.chat_template, MODEL,
            stored=ClientResponses(store),
        )  # fmt: skip
