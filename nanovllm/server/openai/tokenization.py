"""/tokenize, /detokenize and /tokenizer_info: text to token ids and back, with vLLM's fields.

The ids are those that /v1/completions computes, or /v1/chat/completions for messages: a literal
`<|endoftext|>` in a text is ordinary text. A text may be longer than the model's context, so that
clients can find out; its size bounds the cost of a request.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Annotated, Any, TypeAlias, TypeVar

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import JSONResponse, Response

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import check_unicode
from nanovllm.server.http.body import read_body
from nanovllm.server.http.bounded_model import INTEGERS, allow_nulls
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.event_stream import json_response
from nanovllm.server.http.json_io import write_json
from nanovllm.server.openai.chat_prompt import encode_messages
from nanovllm.server.openai.chat_schemas import Messages, PromptFields
from nanovllm.server.openai.response_types import Detokenized, Tokenized, TokenizerInfo
from nanovllm.server.openai.schemas import SPECIAL_TOKENS, Body, TokenId
from nanovllm.server.openapi import operation
from nanovllm.server.service import Service

MAX_TEXT_BYTES = 1 << 18  # of UTF-8: 256 times the context of GPT-2, even if a byte is a token
MAX_TOKENS = 1 << 18
MAX_DETOKENIZED_CHARACTERS = 1 << 24
"""Characters of the tokens in one response. GPT-2's longest token has 128 of them, but a hostile
vocabulary may have tokens of a megabyte."""

B = TypeVar("B", bound=Body)
_Compute: TypeAlias = Callable[[B, Engine, ChatTemplate | None], Mapping[str, Any]]
BoundedTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS), INTEGERS]


def _describe_form(schema: dict[str, Any]) -> None:
    allow_nulls(schema)
    schema["oneOf"] = [_has_field("prompt"), _has_field("messages")]


def _has_field(name: str) -> dict[str, Any]:
    """Return the JSON schema of an object with this field, not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


class TokenizeRequest(PromptFields):
    """The body of POST /tokenize: a text or messages."""

    model_config = ConfigDict(json_schema_extra=_describe_form)

    prompt: str | None = Field(
        None,
        description=f"text of up to {MAX_TEXT_BYTES} bytes in UTF-8",
        json_schema_extra={"maxLength": MAX_TEXT_BYTES},
    )
    messages: Messages | None = Field(
        None, description="a conversation, of which the chat template makes a prompt"
    )
    add_special_tokens: bool | None = Field(
        None,
        description=f"{SPECIAL_TOKENS}; by default true for a text, false for messages",
    )
    return_token_strs: bool | None = Field(
        False, description="also return each token as the vocabulary spells it"
    )

    @model_validator(mode="after")
    def _check_form(self) -> "TokenizeRequest":
        if self.prompt is None and self.messages is None:
            raise InvalidRequestError("prompt or messages is required", param="prompt")
        if self.prompt is not None and self.messages is not None:
            raise InvalidRequestError(
                "prompt and messages cannot be tokenized together; leave one of them out",
                param="messages",
            )
        for name in ("add_generation_prompt", "continue_final_message"):
            if self.messages is None and getattr(self, name):
                raise InvalidRequestError(
                    f"{name} is about messages, which the request has none of; leave it out",
                    param=name,
                )
        return self


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: BoundedTokenIds = Field(description="token ids of the model's vocabulary")
    return_token_strs: bool | None = Field(
        False, description="also return each token as the vocabulary spells it"
    )


def add_tokenization_routes(app: FastAPI, service: Service) -> None:
    """Add the routes; ids and texts are computed on worker threads."""
    async_engine, work, settings = service.engine, service.work, service.settings

    def add(
        path: str, name: str, about: str, kind: type[B], response: Any, compute: _Compute[B]
    ) -> None:
        async def respond(request: Request) -> Response:
            body, num_bytes = await read_body(request, kind, work)
            served_name(body.model, settings.model_names)
            engine, template = async_engine.engine, settings.chat_template
            content = await work.read(
                request,
                num_bytes,
                lambda: write_json(compute(body, engine, template)),
                uses_process=getattr(body, "messages", None) is not None,
            )
            return json_response(content)

        described = operation(400, 404, 503, response=response, body=kind)
        app.post(path, name=name, description=about, **described)(respond)

    about = "Token ids of a text or of messages."
    add("/tokenize", "tokenize_text", about, TokenizeRequest, Tokenized, tokenize)
    about = "The text of token ids."
    add("/detokenize", "detokenize_ids", about, DetokenizeRequest, Detokenized, detokenize)

    @app.get("/tokenizer_info", **operation(503, response=TokenizerInfo))
    async def tokenizer_facts() -> Response:
        """Special tokens and sizes, for programs that let the server tokenize."""
        engine = async_engine.engine
        info: TokenizerInfo = {
            # Programs would tokenize these to learn their ids, but they are ordinary text there.
            "bos_token": None, "eos_token": None,
            "eos_token_ids": list(engine.model.eos_token_ids),
            "special_tokens": engine.tokenizer.special_tokens, "vocab_size": engine.model.vocab,
            "model_max_length": engine.max_model_len,
        }  # fmt: skip
        return JSONResponse(info)


def tokenize(
    body: TokenizeRequest, engine: Engine, template: ChatTemplate | None = None
) -> Tokenized:
    """Return the response of /tokenize; raises InvalidRequestError.

    A long text takes long: call it on a worker thread.
    """
    tokenizer = engine.tokenizer
    if body.messages is None:
        text = body.prompt or ""
        _check_text(text, "prompt")
        tokens = tokenizer.encode(text, add_special_tokens=body.add_special_tokens is not False)
    else:
        tokens = encode_messages(
            body.messages,
            body,
            template,
            tokenizer,
            partial(_check_text, field="messages"),
            add_special_tokens=bool(body.add_special_tokens),
        )
    names = (
        [tokenizer.token_name(token_id) for token_id in tokens] if body.return_token_strs else None
    )
    return {
        "count": len(tokens),
        "max_model_len": engine.max_model_len,
        "tokens": tokens,
        "token_strs": names,
    }


def _check_text(text: str, field: str) -> None:
    check_unicode(field, text)
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        raise InvalidRequestError(
            f"the text of {field} has {size} bytes in UTF-8, the limit is {MAX_TEXT_BYTES}; "
            "send it in parts",
            param=field,
        )


def detokenize(
    body: DetokenizeRequest, engine: Engine, _: ChatTemplate | None = None
) -> Detokenized:
    """Return the response of /detokenize, special tokens included; raises InvalidRequestError.

    Many tokens take long: call it on a worker thread.
    """
    last = engine.model.vocab - 1
    outside = next((token_id for token_id in body.tokens if not 0 <= token_id <= last), None)
    if outside is not None:
        raise InvalidRequestError(
            f"tokens has the id {str(outside)[:24]} but the vocabulary goes from 0 to {last}",
            param="tokens",
        )
    tokenizer = engine.tokenizer
    lengths = (len(tokenizer.token_name(token_id)) for token_id in body.tokens)
    if any(total > MAX_DETOKENIZED_CHARACTERS for total in accumulate(lengths)):
        raise InvalidRequestError(
            f"the {len(body.tokens)} tokens have more than {MAX_DETOKENIZED_CHARACTERS} characters "
            "together, the limit; send fewer at once",
            param="tokens",
        )
    answer: Detokenized = {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_name(token_id) for token_id in body.tokens]
    return answer
