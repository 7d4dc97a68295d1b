"""POST /v1/responses: its body, its parser and its renderer.

OpenAI's Responses API for text. A client sends the whole conversation as `input`, or refers to a
stored response (response_store.py). The chat template makes a prompt of it. Where the model has no
template, an input that is text is the prompt itself.
"""

from collections.abc import Sequence
from typing import Any

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.server.http.errors import problem_of, shorten
from nanovllm.server.http.json_io import dump_json
from nanovllm.server.http.validation_errors import quote
from nanovllm.server.openai import response_types as types
from nanovllm.server.openai.chat_prompt import encode_messages, end_turn
from nanovllm.server.openai.chat_schemas import MAX_MESSAGES, ChatMessage, PromptFields
from nanovllm.server.openai.endpoint import Endpoint, sampling_params
from nanovllm.server.openai.renderer import Renderer, ResponseContext, usage_of
from nanovllm.server.openai.response_schemas import (
    InputMessage,
    ResponsesRequest,
    TextOptions,
)
from nanovllm.server.openai.response_store import (
    MESSAGE_PREFIX,
    RESPONSE_PREFIX,
    ClientResponses,
)
from nanovllm.structured_outputs import StructuredOutputs


def resolve_references(body: ResponsesRequest, stored: ClientResponses) -> ResponsesRequest:
    """Return a body whose input is the whole conversation; raises InvalidRequestError."""
    if isinstance(body.input, str) and body.previous_response_id is None:
        return body
    messages: list[InputMessage] = []
    if body.previous_response_id is not None:
        earlier = stored.conversation(body.previous_response_id)
        if earlier is None:
            raise _not_stored("previous_response_id", body.previous_response_id, stored)
        messages += map(InputMessage.model_validate, earlier)
    referred: dict[str, InputMessage] = {}  # reads each once, however often it is referred to
    for item in body.messages if isinstance(body.input, str) else body.input:
        if isinstance(item, InputMessage):
            messages.append(item)
            continue
        if item.id not in referred:
            found = stored.message(item.id)
            if found is None:
                raise _not_stored("input", item.id, stored)
            referred[item.id] = InputMessage.model_validate(found)
        messages.append(referred[item.id])
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"the conversation has {len(messages)} messages, the limit is {MAX_MESSAGES}; leave "
            "out the oldest",
            param="input",
        )
    return body.model_copy(update={"input": messages})


def _not_stored(param: str, missing_id: str, stored: ClientResponses) -> InvalidRequestError:
    reason = "was dropped, or never stored" if stored.is_kept else "responses are not kept"
    return InvalidRequestError(
        f"{param} refers to {shorten(quote(missing_id), 80)}, which this server does not have "
        f"({reason}); send the whole conversation in input, with store: false",
        param=param,
    )


def conversation(body: ResponsesRequest) -> list[ChatMessage]:
    """Return the messages that the chat template makes a prompt of."""
    if body.instructions is None:
        return [*body.messages]
    return [ChatMessage(role="system", content=body.instructions, name=None), *body.messages]


def parse_response(
    body: ResponsesRequest, engine: Engine, template: ChatTemplate | None
) -> GenerationRequest:
    """Return the request of a body; raises InvalidRequestError."""
    messages = conversation(body)
    prompt: Prompt
    if isinstance(body.input, str) and len(messages) == 1 and template is None:
        prompt = body.input
    else:
        end = PromptFields.model_validate({})
        check_text = engine.input_processor.reader.check_text
        prompt = encode_messages(messages, end, template, engine.tokenizer, check_text)
    params = sampling_params(
        engine,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        structured_outputs=_structured_outputs(body.text),
    )
    params = end_turn(params, template, engine)
    return GenerationRequest(prompts=[prompt], params=params, must_fit=True)


def _structured_outputs(text: TextOptions | None) -> StructuredOutputs | None:
    output_format = None if text is None else text.format
    if output_format is None or output_format.type == "text":
        return None
    if output_format.type == "json_object":
        return StructuredOutputs(json_object=True)
    if output_format.schema_ is None:
        raise InvalidRequestError(
            "text.format has the type json_schema but no schema; add it", param="text"
        )
    return StructuredOutputs(json=output_format.schema_)


class ResponseRenderer(Renderer[ResponsesRequest, RequestOutput]):
    """Renders a response with one message of text, or the events with which it grows."""

    def __init__(self, context: ResponseContext, request: ResponsesRequest) -> None:
        super().__init__(context, request)
        self._item_id = MESSAGE_PREFIX + context.id.removeprefix(RESPONSE_PREFIX)
        self._is_stored = context.stored.is_kept and request.store is not False
        self._conversation = (  # here, because this runs on a worker thread
            [message.model_dump(exclude_none=True) for message in request.messages]
            if self._is_stored
            else []
        )
        self._num_events = 0
        self._text = ""
        self._last_output: RequestOutput | None = None

    def body(self, outputs: Sequence[RequestOutput]) -> types.ModelResponse:
        """Return the body of the whole response."""
        (output,) = outputs
        return self._finished(output, output.outputs[0].text)

    def begin(self) -> bytes:
        """Return the events before any output."""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, index: int, output: RequestOutput) -> bytes:
        """Return the event of the text that is new; the message begins before the first one."""
        events = b"" if self._last_output is not None else self._begin_message()
        self._last_output = output
        delta = output.outputs[0].text
        if delta:
            self._text += delta
            events += self._text_event("response.output_text.delta", delta=delta, logprobs=[])
        return events

    def _begin_message(self) -> bytes:
        item = self._message("in_progress", [])
        return self._event(
            "response.output_item.added", item=item, output_index=0
        ) + self._text_event("response.content_part.added", part=_output_text(""))

    def end(self) -> bytes:
        """Return the events of the complete text, its message and the response."""
        assert self._last_output is not None
        response = self._finished(self._last_output, self._text)
        (item,) = response["output"]
        return b"".join(
            (
                self._text_event("response.output_text.done", text=self._text, logprobs=[]),
                self._text_event("response.content_part.done", part=item["content"][0]),
                self._event("response.output_item.done", item=item, output_index=0),
                self._event(f"response.{response['status']}", response=response),
            )
        )

    def error(self, error: Exception) -> bytes:
        """Return the event of a response that failed."""
        described = problem_of(error).body["error"]
        code = "server_error" if described["code"] == 500 else described["type"]
        response = self._response("failed")
        response["error"] = {"code": code, "message": described["message"]}
        return self._event("response.failed", response=response)

    def _event(self, event_type: str, **fields: Any) -> bytes:
        event = {"type": event_type, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (event_type.encode(), dump_json(event))

    def _text_event(self, event_type: str, **fields: Any) -> bytes:
        return self._event(
            event_type, item_id=self._item_id, output_index=0, content_index=0, **fields
        )

    def _message(
        self, status: types.ResponseStatus, content: list[types.OutputText]
    ) -> types.OutputMessage:
        return {
            "id": self._item_id, "type": "message", "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    def _finished(self, output: RequestOutput, text: str) -> types.ModelResponse:
        """Return the response once its text is complete, and store it."""
        is_cut = output.outputs[0].finish_reason == "length"
        status: types.ResponseStatus = "incomplete" if is_cut else "completed"
        response = self._response(status)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["output"] = [self._message(status, [_output_text(text)])]
        usage = usage_of([output])
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        if self._is_stored:
            own = {"role": "assistant", "content": text}
            response["store"] = self.context.stored.add(response, [*self._conversation, own])
        return response

    def _response(self, status: types.ResponseStatus) -> types.ModelResponse:
        """Return the response before it has any output."""
        context, request = self.context, self.request
        output_format = request.text and request.text.format
        return {
            "id": context.id, "object": "response", "created_at": context.created,
            "status": status, "error": None, "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "model": context.model, "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id, "store": self._is_stored,
            "temperature": request.temperature,
            "text": {
                "format": output_format.model_dump(by_alias=True, exclude_none=True)
                if output_format
                else {"type": "text"}
            },
            "tool_choice": request.tool_choice or "auto", "tools": [], "top_p": request.top_p,
            "truncation": "disabled", "usage": None,
        }  # fmt: skip


def _output_text(text: str) -> types.OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


RESPONSES = Endpoint(
    path="/v1/responses",
    name="responses",
    description="Answer text or a conversation.",
    id_prefix=RESPONSE_PREFIX,
    body=ResponsesRequest,
    resolve=resolve_references,
    parse=parse_response,
    renderer=ResponseRenderer,
    response=types.ModelResponse,
    event=types.ResponseEvent,
    ends_with_done=False,
    has_secret_ids=True,
    uses_process=True,
)
