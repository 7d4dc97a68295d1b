"""POST /v1/responses: the official client, the events of a stream, and what is refused."""

import json
from typing import Any

import pytest
from openai import OpenAI
from pydantic import TypeAdapter

from nanovllm import LLM, SamplingParams
from nanovllm.errors import EngineFaultError, InvalidRequestError, RequestTimeoutError
from nanovllm.server.openai.endpoint import prepare
from nanovllm.server.openai.response_schemas import ResponsesRequest
from nanovllm.server.openai.response_types import ResponseError
from nanovllm.server.openai.responses import RESPONSES, ResponseRenderer
from tests.support.chats import MESSAGES, prompt_of
from tests.support.serving import MODEL, RunningServer, read_error, wait_until

SETTINGS: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}


def error_of(server: RunningServer, **body: Any) -> dict[str, Any]:
    return read_error(server.http.post("/v1/responses", json={"input": "the", **body}), 400)


def events_of(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that its data has as `type`."""
    response = server.http.post("/v1/responses", json={"stream": True, **SETTINGS, **body})
    assert response.status_code == 200, response.text
    events = []
    for part in response.content.removesuffix(b"\n\n").split(b"\n\n"):
        name, _, data = part.partition(b"\ndata: ")
        event = json.loads(data)
        assert name == b"event: " + event["type"].encode()
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_the_official_client_gets_the_text_of_the_rendered_messages(
    chat_client: OpenAI, llm: LLM
) -> None:
    prompt = prompt_of(llm)
    params = SamplingParams(max_tokens=12, temperature=0)
    expected = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    for request in (
        {"input": MESSAGES},
        {"instructions": MESSAGES[0]["content"], "input": MESSAGES[1]["content"]},
    ):
        answer = chat_client.responses.create(**SETTINGS, **request, metadata={"a": "b"})
        assert answer.id.startswith("resp_")
        assert (answer.object, answer.model, answer.metadata) == ("response", MODEL, {"a": "b"})
        assert answer.output_text == expected.text
        assert answer.incomplete_details is not None
        assert (answer.status, answer.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), 12)
        again: Any = [*MESSAGES, *answer.output, {"role": "user", "content": "a"}]
        assert chat_client.responses.create(**SETTINGS, input=again).usage is not None


def test_the_official_client_follows_a_stream(chat_client: OpenAI) -> None:
    whole = chat_client.responses.create(**SETTINGS, input="the end")
    events = list(chat_client.responses.create(**SETTINGS, input="the end", stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    final = events[-1].response
    assert text == final.output_text == whole.output_text
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens == 12


def test_the_events_come_in_the_official_order(server: RunningServer) -> None:
    events = events_of(server, input="the end")
    names = [event["type"].removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert names[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = "".join(event["delta"] for event in events[4:-4])
    response = events[-1]["response"]
    assert events[-4]["text"] == events[-3]["part"]["text"] == text
    assert response["output"] == [events[-2]["item"]]
    assert response["output"][0]["content"][0]["text"] == text
    assert events[0]["response"]["id"] == response["id"]
    assert events[0]["response"]["status"] == "in_progress"


def test_without_a_template_text_is_the_prompt_itself(llm: LLM) -> None:
    body = ResponsesRequest.model_validate({"input": "the end"})
    renderer, _ = prepare(RESPONSES, body, llm.engine, None, MODEL)
    assert renderer.context.prompt_tokens == len(llm.tokenizer.encode("the end"))
    for more in ({"instructions": "in"}, {"input": MESSAGES}):
        body = ResponsesRequest.model_validate({"input": "the end", **more})
        with pytest.raises(
            InvalidRequestError, match="no chat template, so its messages"
        ) as caught:
            prepare(RESPONSES, body, llm.engine, None, MODEL)
        assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFaultError("late"), "server_error"),
        (RequestTimeoutError("late", has_begun=False), "ServiceUnavailableError"),
        (RequestTimeoutError("late", has_begun=True), "TimeoutError"),
    ],
)
def test_a_failed_response_has_the_code_of_its_error(llm: LLM, error: Exception, code: str) -> None:
    body = ResponsesRequest.model_validate({"input": "the end", "stream": True})
    renderer, _ = prepare(RESPONSES, body, llm.engine, None, MODEL)
    event = renderer.error(error)
    response = json.loads(event.partition(b"data: ")[2])["response"]
    assert response["error"] == {"code": code, "message": "late"}
    assert code in TypeAdapter(ResponseError).json_schema()["properties"]["code"]["enum"]


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation"),
        ({"previous_response_id": 1}, "previous_response_id", "must be text"),
        ({"conversation": {"id": "c"}}, "conversation", "use previous_response_id"),
        ({"input": [{"type": "item_reference"}]}, "input", "input.0.id: required"),
        ({"background": True}, "background", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "calls no tools"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"include": ["message.output_text.logprobs"]}, "include", "text only"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "does not reason"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"max_tool_calls": 1}, "max_tool_calls", "not supported"),
        ({"input": []}, "input", "input: must have at least 1 entry"),
        ({"input": None}, "input", "must be a list"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input", "function_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input",
            "input_image",
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "add it"),
        ({"max_output_tokens": 4000}, "max_output_tokens", "max_output_tokens is 4,000"),
    ],
)
def test_what_is_left_out_is_refused_by_name(
    server: RunningServer, body: dict[str, Any], param: str, part: str
) -> None:
    error = error_of(server, **body)
    assert error["param"] == param
    assert part in error["message"]


def test_a_schema_is_followed_and_its_errors_name_the_field(
    chat_client: OpenAI, server: RunningServer
) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    with chat_client.responses.stream(model=MODEL, input="the", text=text) as stream:
        answer = stream.get_final_response()
    assert answer.status == "completed"
    assert json.loads(answer.output_text)["a"] in ("x", "y")
    text["format"]["schema"] = {"type": "nothing"}
    error = error_of(server, text=text)
    assert (error["param"], error["message"]) == (
        "text.format",
        "text.format cannot be used: Invalid type: nothing",
    )


def test_a_fault_in_the_middle_of_a_stream_ends_it_as_failed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("the reason is for the log")

    monkeypatch.setattr(ResponseRenderer, "delta", fail)
    last = events_of(server, input="the")[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert "for the log" not in last["response"]["error"]["message"]
    monkeypatch.undo()
    wait_until(server.is_idle)
