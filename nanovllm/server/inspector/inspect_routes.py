"""/v1/inspect/*: attention, logit lens and embeddings of the served model.

    POST /v1/inspect/attention /v1/inspect/attention_head /v1/inspect/overview
         /v1/inspect/logit_lens /v1/inspect/ablation /v1/inspect/ablation_map
    GET  /v1/inspect/embeddings /v1/inspect/neighbors

One worker process computes them, so that they slow generation down by at most a thread of the
lowest priority. It sends the response as JSON, which is passed on as it is.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import FastAPI
from pydantic import Field, WithJsonSchema, field_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from nanovllm.inspection.ablation import MAX_PARTS
from nanovllm.inspection.attention import HeadStatistics
from nanovllm.inspection.embeddings import DEFAULT_POINTS, MAX_NEIGHBORS, MAX_POINTS
from nanovllm.inspection.logit_lens import MAX_TOP
from nanovllm.inspection.observe import MAX_PROMPT_CHARACTERS, MAX_PROMPT_TOKENS
from nanovllm.inspection.worker_process import InspectionWorker
from nanovllm.model.ablation import PartKind
from nanovllm.server.http.body import check_query, read_body
from nanovllm.server.http.bounded_model import BoundedModel, as_integer, at_most, types_of
from nanovllm.server.http.event_stream import json_response
from nanovllm.server.http.worker_pools import WorkerPools
from nanovllm.server.openapi import operation
from nanovllm.server.service import Service

_MAX_CACHED = 4  # projections, of up to 5,000 points each
_MAX_TEXT_CHARACTERS = 1000  # of the text of one token
_STATUSES = (400, 403, 429, 503, 504)
_Inspect: TypeAlias = Callable[[Request, str, Mapping[str, Any]], Awaitable[bytes]]
"""Return the JSON of `responses.run` for a request, an endpoint's name and its arguments."""

InspectedPrompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS},
                {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "minItems": 1,
                    "maxItems": MAX_PROMPT_TOKENS,
                },
            ]
        }
    ),
]


class InspectRequest(BoundedModel):
    """The body of POST /v1/inspect/overview."""

    prompt: InspectedPrompt = Field(description="a text or a list of token ids")

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, list) and len(value) <= MAX_PROMPT_TOKENS:
            token_ids = [as_integer(item) for item in value]
            if types_of(token_ids) <= {int}:
                return token_ids
        raise ValueError(f"must be text, or a list of up to {MAX_PROMPT_TOKENS} token ids")


class AttentionRequest(InspectRequest):
    """The body of POST /v1/inspect/attention."""

    layer: int | None = Field(None, ge=0, description="one layer, from 0; null for all")


class AttentionHeadRequest(InspectRequest):
    """The body of POST /v1/inspect/attention_head."""

    layer: int = Field(0, ge=0, description="from 0")
    head: int = Field(0, ge=0, description="from 0")
    query: int | None = Field(
        None, ge=0, description="position of the token that attends, from 0; null for the last"
    )


class LogitLensRequest(InspectRequest):
    """The body of POST /v1/inspect/logit_lens."""

    top: int = Field(5, ge=1, le=MAX_TOP, description="most probable tokens of each prediction")


class AblatedPart(BoundedModel):
    """A part of the network that is switched off."""

    layer: int = Field(ge=0, description="from 0")
    kind: PartKind = Field(
        description="a head, the attention or the feed-forward (ffn) sublayer, or both (block)"
    )
    head: int | None = Field(None, ge=0, description="from 0; of the kind head only")


class AblationRequest(InspectRequest):
    """The body of POST /v1/inspect/ablation."""

    off: Annotated[list[AblatedPart], at_most(MAX_PARTS)] = Field(
        [], max_length=MAX_PARTS, description="parts that are switched off together"
    )
    top: int = Field(5, ge=1, le=MAX_TOP, description="most probable tokens of each prediction")


class EmbeddingsQuery(BoundedModel):
    """The query of GET /v1/inspect/embeddings."""

    method: Literal["pca", "tsne"] = Field("pca", description="projection; tsne needs an extra")
    limit: int = Field(
        DEFAULT_POINTS, ge=3, le=MAX_POINTS, description="number of tokens, those of the lowest ids"
    )


class NeighborsQuery(BoundedModel):
    """The query of GET /v1/inspect/neighbors."""

    token: int | None = Field(None, ge=0, description="a token id")
    text: str | None = Field(
        None, min_length=1, max_length=_MAX_TEXT_CHARACTERS, description="the text of one token"
    )
    count: int = Field(10, ge=1, le=MAX_NEIGHBORS, description="number of neighbors")


class InspectedToken(TypedDict):
    """A token; its text is U+FFFD for a part of a character."""

    id: int
    text: str
    bytes: NotRequired[
        Annotated[str, Field(description="in hexadecimal, if they are not valid UTF-8")]
    ]


class AttentionWeights(TypedDict):
    """Attention weights: base64 of little-endian float32, in the order of `layout`."""

    tokens: list[InspectedToken]
    layers: int
    heads: int
    dtype: str
    layout: str
    layer: int | None
    weights: str


class AttentionHead(TypedDict):
    """How a head computes the output of one query from the tokens up to it.

    scores = scale * k @ q, weights = softmax(scores), output = weights @ v.
    """

    tokens: list[InspectedToken]
    layer: int
    head: int
    query: int
    scale: Annotated[float, Field(description="factor of the scores, usually 1 / sqrt(head_dim)")]
    q: Annotated[list[float], Field(description="query [head_dim]")]
    k: Annotated[list[list[float]], Field(description="keys [query + 1, head_dim]")]
    v: Annotated[list[list[float]], Field(description="values [query + 1, head_dim]")]
    scores: Annotated[list[float], Field(description="[query + 1], before the softmax")]
    weights: Annotated[list[float], Field(description="[query + 1]; their sum is 1")]
    output: Annotated[list[float], Field(description="[head_dim]")]


class AttentionOverview(TypedDict):
    """Statistics of every head."""

    tokens: list[InspectedToken]
    heads: list[HeadStatistics]


class LensToken(InspectedToken):
    """A token and its probability."""

    p: float


class LensCell(TypedDict):
    """A prediction: the last position has no next token."""

    top: list[LensToken]
    entropy: Annotated[float, Field(description="in nats")]
    rank_of_next: int | None
    p_of_next: float | None


class LogitLens(TypedDict):
    """Predictions [layer, position]; the last row is the model's own."""

    tokens: list[InspectedToken]
    layers: list[str]
    cells: list[list[LensCell]]


class PromptPrediction(TypedDict):
    """The loss of a prompt, null for one token, and the prediction at each position."""

    loss: Annotated[float | None, Field(description="in nats per token")]
    cells: list[LensCell]


class SwitchedPart(TypedDict):
    """A part of the network; `head` is null for another kind."""

    layer: int
    kind: PartKind
    head: int | None


class Ablation(TypedDict):
    """Predictions of the whole network, and without the parts in `off`."""

    tokens: list[InspectedToken]
    layers: int
    heads: int
    off: list[SwitchedPart]
    whole: PromptPrediction
    ablated: PromptPrediction


class PartLoss(SwitchedPart):
    """The loss without a part, in nats per token; null for a prompt of one token."""

    loss: float | None


class AblationMap(TypedDict):
    """The loss of a prompt, and that without each part in turn, in nats per token."""

    tokens: list[InspectedToken]
    layers: int
    heads: int
    loss: float | None
    parts: list[PartLoss]


class EmbeddingPoint(InspectedToken):
    """A token in the plane."""

    x: float
    y: float


class EmbeddingPoints(TypedDict):
    """Tokens in the plane; `explained` are parts of the variance, null for t-SNE."""

    method: str
    methods: Annotated[list[str], Field(description="projections that this server can compute")]
    explained: list[float] | None
    vocab: int
    points: list[EmbeddingPoint]


class Neighbor(InspectedToken):
    """A token and its cosine."""

    cosine: float


class Neighbors(TypedDict):
    """The nearest tokens, nearest first."""

    token: InspectedToken
    neighbors: list[Neighbor]


def add_inspect_routes(app: FastAPI, service: Service, worker: InspectionWorker) -> None:
    """Add the routes; `worker` ends with the engine."""
    engine, work = service.engine, service.work
    engine.when_stopped(worker.close)

    async def inspect(request: Request, name: str, arguments: Mapping[str, Any]) -> bytes:
        _ = engine.engine  # 503 until the model is loaded
        return await work.inspect(request, lambda: worker.run(name, arguments))

    _add_prompt_routes(app, inspect, work)
    _add_vocabulary_routes(app, inspect)


def _add_prompt_routes(app: FastAPI, inspect: _Inspect, work: WorkerPools) -> None:
    """Add the routes that inspect the forward pass of a prompt."""

    def add(name: str, kind: type[InspectRequest], answer: Any, description: str) -> None:
        async def endpoint(request: Request) -> Response:
            body, _ = await read_body(request, kind, work)
            return json_response(await inspect(request, name, body.model_dump()))

        app.post(
            f"/v1/inspect/{name}",
            name=name,
            description=description,
            **operation(*_STATUSES, response=answer, body=kind),
        )(endpoint)

    add("attention", AttentionRequest, AttentionWeights, "Attention weights of a prompt's tokens.")
    add(
        "attention_head",
        AttentionHeadRequest,
        AttentionHead,
        "Query, keys, values and scores of a head.",
    )
    add("overview", InspectRequest, AttentionOverview, "Statistics of every attention head.")
    add("logit_lens", LogitLensRequest, LogitLens, "The prediction of every layer.")
    add("ablation", AblationRequest, Ablation, "Predictions with parts switched off.")
    add("ablation_map", InspectRequest, AblationMap, "The loss without each part in turn.")


def _add_vocabulary_routes(app: FastAPI, inspect: _Inspect) -> None:
    """Add the routes that inspect the token embeddings."""
    projections: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    @app.get(
        "/v1/inspect/embeddings",
        **operation(*_STATUSES, response=EmbeddingPoints, query=EmbeddingsQuery),
    )
    async def embedding_points(request: Request) -> Response:
        """Token embeddings in two dimensions."""
        query = check_query(request, EmbeddingsQuery)
        key = (query.method, query.limit)
        content = projections.get(key)
        if content is None:
            content = await inspect(request, "embeddings", query.model_dump())
            projections[key] = content
            if len(projections) > _MAX_CACHED:
                projections.popitem(last=False)
        projections.move_to_end(key)
        return json_response(content)

    @app.get(
        "/v1/inspect/neighbors",
        **operation(*_STATUSES, response=Neighbors, query=NeighborsQuery),
    )
    async def nearest_neighbors(request: Request) -> Response:
        """The tokens whose embeddings have the largest cosine with a token's."""
        query = check_query(request, NeighborsQuery)
        return json_response(await inspect(request, "neighbors", query.model_dump()))
