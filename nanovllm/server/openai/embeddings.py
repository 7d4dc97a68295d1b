"""POST /v1/embeddings: its body, its parser and its renderer.

The fields are OpenAI's, and `pooling`. An embedding is the final hidden state of the last token, or
the mean of all, scaled to length 1. The engine batches inputs with requests that generate.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest, PoolingParams
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import EmbeddingRequestOutput
from nanovllm.sampling_params import TruncationSide
from nanovllm.server.openai.completions import check_truncated
from nanovllm.server.openai.endpoint import Endpoint
from nanovllm.server.openai.prompts import Prompts, check_prompts, list_prompts
from nanovllm.server.openai.renderer import Renderer
from nanovllm.server.openai.response_types import Embedding, EmbeddingList
from nanovllm.server.openai.schemas import (
    CACHE_SALT,
    NO_EFFECT,
    PRIORITY,
    SPECIAL_TOKENS,
    CacheSalt,
    GenerationBody,
    Label,
    NotSupported,
    Priority,
    TruncatePromptTokens,
)

MANY_NUMBERS = 4096  # writing them takes about 3 ms


class EmbeddingRequest(GenerationBody):
    """The body of POST /v1/embeddings."""

    input: Annotated[Prompts, AfterValidator(check_prompts)] = Field(
        description="text, token ids, or a list of either"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="base64: the bytes of little-endian float32 numbers"
    )
    dimensions: Annotated[int | None, NotSupported] = None
    user: Label | None = Field(None, description=NO_EFFECT)

    pooling: Literal["last", "mean"] = Field(
        "last", description="the last token's hidden state, or the mean of all"
    )
    priority: Priority = Field(0, description=PRIORITY)
    cache_salt: CacheSalt | None = Field(None, description=CACHE_SALT)
    truncate_prompt_tokens: TruncatePromptTokens = None
    truncation_side: TruncationSide | None = Field(
        None, description="side on which a longer prompt is cut; by default right"
    )
    add_special_tokens: bool = Field(True, description=SPECIAL_TOKENS)

    @property
    def logged_prompts(self) -> list[str | list[int]]:
        """The inputs as the client sent them, for the request log."""
        return list_prompts(self.input)

    @property
    def num_choices(self) -> int:
        """Number of inputs."""
        return len(self.logged_prompts)

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        return {"prompt": "input"}


def parse_embeddings(
    body: EmbeddingRequest, engine: Engine, _: ChatTemplate | None
) -> GenerationRequest:
    """Return the request of a body; raises InvalidRequestError."""
    if body.dimensions is not None:
        raise InvalidRequestError(
            "dimensions is not supported: the embeddings of this model have "
            f"{engine.model.d_model} numbers, and it was not trained for fewer; leave it out",
            param="dimensions",
        )
    if body.truncate_prompt_tokens is not None:
        check_truncated("input", body.logged_prompts)
    params = PoolingParams(
        pooling=body.pooling,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        truncation_side=body.truncation_side or "right",
    )
    return GenerationRequest(
        prompts=body.logged_prompts,
        params=params,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
    )


class EmbeddingRenderer(Renderer[EmbeddingRequest, EmbeddingRequestOutput]):
    """Renders embeddings as lists of numbers or as base64."""

    def is_large(self, outputs: Sequence[EmbeddingRequestOutput]) -> bool:
        """Return whether there are many numbers."""
        return sum(len(output.outputs.embedding) for output in outputs) > MANY_NUMBERS

    def body(self, outputs: Sequence[EmbeddingRequestOutput]) -> Mapping[str, Any]:
        """Return the body of the whole response."""
        tokens = self.context.prompt_tokens
        return {
            "id": self.context.id,
            "object": "list",
            "created": self.context.created,
            "data": self._data(outputs),
            "model": self.context.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _data(self, outputs: Sequence[EmbeddingRequestOutput]) -> Iterator[Embedding]:
        is_base64 = self.request.encoding_format == "base64"
        for index, output in enumerate(outputs):
            vector = output.outputs.embedding
            yield {
                "object": "embedding",
                "index": index,
                "embedding": encode_base64(vector) if is_base64 else vector,
            }


def encode_base64(embedding: Sequence[float]) -> str:
    """Return the base64 of the numbers as little-endian float32."""
    return base64.b64encode(np.array(embedding, dtype="<f4").tobytes()).decode("ascii")


EMBEDDINGS = Endpoint(
    path="/v1/embeddings",
    name="embeddings",
    description="Turn one or several texts into vectors.",
    id_prefix="embd-",
    body=EmbeddingRequest,
    parse=parse_embeddings,
    renderer=EmbeddingRenderer,
    response=EmbeddingList,
)
