"""POST /v1/responses: its body, its parser and its renderer.

OpenAI's Responses API for text, without state: a client sends the whole conversation as `input`.
The chat template makes a prompt of it. Where the model has no template, an input that is text is
the prompt itself.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import MAX_PROMPT_TOKENS
from nanovllm.server.http.bounds import BoundedModel, JSONObject
from nanovllm.server.http.errors import error_of, shorten
from nanovllm.server.http.problems import quote
from nanovllm.server.openai.chat_prompt import encode_prompt, end_turn
from nanovllm.server.openai.chat_schemas import (
    MAX_MESSAGES,
    NO_ITEMS,
    ChatMessage,
    PromptFields,
    Tools,
    content_schema,
    join_parts,
)
from nanovllm.server.openai.endpoint import Endpoint, sampling_params
from nanovllm.server.openai.renderer import Renderer, ResponseContext, usage_of
from nanovllm.server.openai.response_types import (
    ModelResponse,
    OutputMessage,
    OutputText,
    ResponseEvent,
    ResponseStatus,
)
from nanovllm.server.openai.schemas import NO_EFFECT, GenerationBody, UnusedFields, refuse
from nanovllm.structured_outputs import StructuredOutputs

_ID_PREFIX = "resp_"
_join_parts = partial(join_parts, part_type="input_text", answer_type="output_text")


class InputMessage(ChatMessage):
    """One item of `input`; an assistant's may be an output item of an earlier response."""

    unused_keys: ClassVar[tuple[str, ...]] = (*ChatMessage.unused_keys, "status")

    type: Literal["message"] | None = None
    content: Annotated[
        str, BeforeValidator(_join_parts), WithJsonSchema(content_schema("input_text"))
    ]

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, item: Any) -> Any:
        if isinstance(item, dict) and item.get("type") not in (None, "message"):
            raise ValueError(f"the type {shorten(quote(item['type']))} is not supported")
        return item


def _text_or_list(value: Any, check_list: ValidatorFunctionWrapHandler) -> Any:
    """Return text unchanged; a union type would report an error for each of its types."""
    return value if isinstance(value, str) else check_list(value)


def _describe_input(schema: dict[str, Any]) -> None:
    messages = {name: schema.pop(name) for name in ("type", "items", "minItems", "maxItems")}
    schema["oneOf"] = [{"type": "string"}, messages]


class TextFormat(BoundedModel):
    """`text.format`; a schema is always followed, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=1024)
    schema_: JSONObject | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BoundedModel):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(None, description=NO_EFFECT)


_NO_STATE = "this server keeps no responses, so send the whole conversation in input"
_NULL = WithJsonSchema({"type": "null"})
_EMPTY = WithJsonSchema({"type": "object", "maxProperties": 0})
_FALSE = WithJsonSchema({"type": "boolean", "const": False})


class ResponsesRequest(UnusedFields, GenerationBody):
    """The body of POST /v1/responses."""

    prompt_field: ClassVar[str] = "input"

    input: Annotated[
        list[InputMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        WrapValidator(_text_or_list),
    ] = Field(description="text, or a list of messages", json_schema_extra=_describe_input)
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_PROMPT_TOKENS,
        description="maximum tokens to generate; by default what the context has room for",
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = False
    text: TextOptions | None = None

    store: Annotated[bool | None, refuse("this server keeps no responses", False), _FALSE] = None
    background: Annotated[bool | None, refuse("responses are not kept", False), _FALSE] = None
    previous_response_id: Annotated[Any, refuse(_NO_STATE), _NULL] = None
    conversation: Annotated[Any, refuse(_NO_STATE), _NULL] = None
    include: Annotated[Any, refuse("responses have text only", []), WithJsonSchema(NO_ITEMS)] = None
    reasoning: Annotated[Any, refuse("the model does not reason", {}), _EMPTY] = None
    tools: Tools | None = Field(None, description=NO_EFFECT)
    tool_choice: Literal["auto", "none"] | None = Field(None, description=NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    truncation: Literal["disabled"] | None = Field(None, description=NO_EFFECT)

    @property
    def logged_prompts(self) -> list[str | list[int]]:
        """The texts of the input, without `instructions`, for the request log."""
        if isinstance(self.input, str):
            return [self.input]
        return [message.content for message in self.input]

    @property
    def num_choices(self) -> int:
        """Number of choices that are generated."""
        return 1

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        return {
            "max_tokens": "max_output_tokens",
            "structured_outputs.json": "text.format.schema",
            "structured_outputs": "text.format",
        }


def parse_response(
    body: ResponsesRequest, engine: Engine, template: ChatTemplate | None
) -> GenerationRequest:
    """Return the request of a body; raises InvalidRequestError."""
    messages: list[ChatMessage] = []
    if body.instructions is not None:
        messages.append(ChatMessage(role="system", content=body.instructions, name=None))
    if isinstance(body.input, str):
        messages.append(ChatMessage(role="user", content=body.input, name=None))
    else:
        messages += body.input
    prompt: Prompt
    if isinstance(body.input, str) and len(messages) == 1 and template is None:
        prompt = body.input
    else:
        end = PromptFields.model_validate({})
        prompt = encode_prompt(messages, end, template, engine.input_processor)
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


class ResponseRenderer(Renderer[RequestOutput]):
    """Renders a response with one message of text, or the events with which it grows."""

    def __init__(self, context: ResponseContext, request: ResponsesRequest) -> None:
        """Render the response to a request."""
        self._context = context
        self._request = request
        self._item_id = "msg_" + context.id.removeprefix(_ID_PREFIX)
        self._num_events = 0
        self._text = ""
        self._last_output: RequestOutput | None = None

    def body(self, outputs: Sequence[RequestOutput]) -> ModelResponse:
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
        described = error_of(error)
        code = "server_error" if described["code"] == 500 else described["type"]
        response = self._response("failed")
        response["error"] = {"code": code, "message": described["message"]}
        return self._event("response.failed", response=response)

    def _event(self, event_type: str, **fields: Any) -> bytes:
        event = {"type": event_type, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        data = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return f"event: {event_type}\ndata: {data}\n\n".encode()

    def _text_event(self, event_type: str, **fields: Any) -> bytes:
        return self._event(
            event_type, item_id=self._item_id, output_index=0, content_index=0, **fields
        )

    def _message(self, status: ResponseStatus, content: list[OutputText]) -> OutputMessage:
        return {
            "id": self._item_id, "type": "message", "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    def _finished(self, output: RequestOutput, text: str) -> ModelResponse:
        """Return the response once its text is complete."""
        is_cut = output.outputs[0].finish_reason == "length"
        status: ResponseStatus = "incomplete" if is_cut else "completed"
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
        return response

    def _response(self, status: ResponseStatus) -> ModelResponse:
        """Return the response before it has any output."""
        context, request = self._context, self._request
        output_format = request.text and request.text.format
        return {
            "id": context.id, "object": "response", "created_at": context.created,
            "status": status, "error": None, "incomplete_details": None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {}, "model": context.model, "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "temperature": request.temperature,
            "text": {
                "format": output_format.model_dump(by_alias=True, exclude_none=True)
                if output_format
                else {"type": "text"}
            },
            "tool_choice": request.tool_choice or "auto", "tools": [], "top_p": request.top_p,
            "truncation": "disabled", "usage": None,
        }  # fmt: skip


def _output_text(text: str) -> OutputText:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


RESPONSES = Endpoint(
    path="/v1/responses",
    name="responses",
    description="Answer text or a conversation; the server keeps nothing of it.",
    id_prefix=_ID_PREFIX,
    body=ResponsesRequest,
    parse=parse_response,
    renderer=ResponseRenderer,
    response=ModelResponse,
    event=ResponseEvent,
    ends_with_done=False,
    is_guarded=lambda _: True,
)
