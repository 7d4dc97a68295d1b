"""POST /v1/embeddings: texts as vectors, the final hidden state of their last token or the mean of all, scaled to length 1.

OpenAI's fields, and `pooling`. Each input is a request of the engine like any other: scheduled, batched and cut into chunks with those
that generate, and ended when its client goes away.
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import AfterValidator, Field
from starlette.responses import Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.body import read_body
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.json_writer import write_json
from nanovllm.server.http.request_log import record_of
from nanovllm.server.http.work import Work
from nanovllm.server.openai.completions import check_truncated
from nanovllm.server.openai.response_types import Embedding, EmbeddingList
from nanovllm.server.openai.responses import finish_all, json_response
from nanovllm.server.openai.schemas import (
    MAX_PRIORITY,
    MAX_USER_CHARACTERS,
    NO_EFFECT,
    Body,
    NotSupported,
    Prompts,
    Side,
    TruncatePromptTokens,
    check_prompts,
    list_prompts,
)
from nanovllm.server.openapi import answers, request_body


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings."""

    input: Annotated[Prompts, AfterValidator(check_prompts)] = Field(
        description="text, token ids, or a list of either"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: the bytes of little-endian float32 numbers"
    )
    dimensions: Annotated[int | None, NotSupported] = None
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS, description=NO_EFFECT)

    pooling: Literal["last", "mean"] = Field(
        "last", description="the last token's hidden state, or the mean of all"
    )
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    truncate_prompt_tokens: TruncatePromptTokens = None
    truncation_side: Side = None
    add_special_tokens: bool = Field(
        True, description="those that the tokenizer puts around a text; GPT-2's has none"
    )

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one."""
        return list_prompts(self.input)


def add_embeddings(
    app: FastAPI,
    engine: AsyncEngine,
    model_names: Sequence[str],
    stalled_client_s: float,
    work: Work,
) -> None:
    """Add the route to an application that answers for `engine` under these names."""

    @app.post(
        "/v1/embeddings",
        responses=answers(400, 404, 429, 503, 504, whole=EmbeddingList),
        openapi_extra=request_body(EmbeddingRequest),
    )
    async def embeddings(request: Request) -> Response:
        """Turn one or several texts into vectors."""
        body, num_bytes = await read_body(request, EmbeddingRequest, work)
        model = served_name(body.model, model_names)
        record = record_of(request)
        inputs = body.inputs
        record.note_prompts(inputs)
        engine.check_room(len(inputs))  # before time is spent on their text
        loaded = engine.engine
        prepared_requests = await work.read(
            request, num_bytes, lambda: prepare_requests(body, loaded)
        )
        record.note_submissions(prepared_requests)
        record.completion_tokens = 0
        await finish_all(engine, request, prepared_requests)
        content = await work.writer(request)(
            lambda: write_json(embedding_body(prepared_requests, model, body.encoding_format))
        )  # may be a million numbers
        return json_response(content, stalled_client_s)


def prepare_requests(body: EmbeddingRequest, engine: Engine) -> list[PreparedRequest]:
    """Check every input against the model; raises InvalidRequestError that says which one is at fault."""
    if body.dimensions is not None:
        raise InvalidRequestError(
            f"dimensions is not supported: the embeddings of this model have {engine.model.d_model} "
            "numbers, and it was not trained for fewer; leave it out",
            param="dimensions",
        )
    if body.truncate_prompt_tokens is not None:
        check_truncated("input", body.inputs)
    prepared_requests = []
    for index, text in enumerate(body.inputs):
        try:
            prepared = engine.input_processor.embed(
                engine.input_processor.new_request_id("embd"),
                text,
                pooling=body.pooling,
                priority=body.priority,
                cache_salt=body.cache_salt or "",
                add_special_tokens=body.add_special_tokens,
                truncate_prompt_tokens=body.truncate_prompt_tokens,
                truncation_side=body.truncation_side or "right",
            )
        except InvalidRequestError as error:
            if error.param != "prompt":
                raise
            place = f"input {index}" if len(body.inputs) > 1 else "input"
            raise error.at(place, param="input") from error
        prepared_requests.append(prepared)
    return prepared_requests


def embedding_body(
    prepared_requests: Sequence[PreparedRequest], model: str, encoding_format: str | None
) -> dict[str, Any]:
    """The answer, once every input is read; raises EngineFaultError where the network's output is not a number."""
    outputs = [prepared.output_processor.embedding() for prepared in prepared_requests]
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    data: list[Embedding] = []
    for index, output in enumerate(outputs):
        vector = output.outputs.embedding
        data.append(
            {
                "object": "embedding",
                "index": index,
                "embedding": encode_base64(vector) if encoding_format == "base64" else vector,
            }
        )
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def encode_base64(embedding: Sequence[float]) -> str:
    """The numbers as little-endian float32, which they are already, in base64."""
    return base64.b64encode(np.array(embedding, dtype="<f4").tobytes()).decode("ascii")
