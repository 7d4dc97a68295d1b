"""The types of responses, for mypy and for /openapi.json; they cost nothing while serving."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]
Time = Annotated[int, Field(ge=0, description="seconds since 1970")]
LogProbability = Annotated[float, Field(ge=-9999, description="natural; -9999 for minus infinity")]
FinishReason = Annotated[str, Field(json_schema_extra={"enum": ["stop", "length"]})]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
Role = Literal["system", "developer", "user", "assistant"]
StopReason = Annotated[
    int | str | None,
    Field(description="the stop string or token id; null for the end of text"),
]
TokenStrings = Annotated[
    list[str], Field(description="the tokens as the vocabulary spells them, if requested")
]


class Model(TypedDict):
    """The served model under one of its names."""

    id: str
    object: Literal["model"]
    created: Time
    owned_by: str
    root: Annotated[str, Field(description="the first of its names")]
    max_model_len: Annotated[int, Field(ge=1, description="tokens of the context")]
    has_chat_template: Annotated[bool, Field(description="whether chats are answered")]
    sampling_defaults: Annotated[
        dict[str, float], Field(description="values of fields that a request leaves out")
    ]


class ModelList(TypedDict):
    """The served model under each of its names."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """Token ids of a text."""

    count: Count
    max_model_len: Annotated[int, Field(ge=1, description="tokens of the context")]
    tokens: list[TokenId]
    token_strs: TokenStrings | None


class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str
    token_strs: NotRequired[TokenStrings]


class TokenizerInfo(TypedDict):
    """The special tokens and sizes of the model."""

    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[TokenId]
    special_tokens: dict[str, TokenId]
    vocab_size: Annotated[int, Field(ge=1)]
    model_max_length: Annotated[int, Field(ge=1, description="tokens of the context")]


class ResponseHead(TypedDict):
    """What responses have in common, and the chunks of streams."""

    id: str
    created: Time
    model: str


class EmbeddingUsage(TypedDict):
    """Number of tokens."""

    prompt_tokens: Count
    total_tokens: Count


class Embedding(TypedDict):
    """One input as a vector of length 1."""

    object: Literal["embedding"]
    index: Count
    embedding: Annotated[
        list[float] | str, Field(description="or the base64 of little-endian float32 numbers")
    ]


class EmbeddingList(ResponseHead):
    """The response of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    usage: EmbeddingUsage


class PromptTokensDetails(TypedDict):
    """Details of the prompt tokens."""

    cached_tokens: Annotated[int, Field(ge=0, description="found in the prefix cache")]


class CompletionTokensDetails(TypedDict):
    """Tokens that speculative decoding has drafted; only where the server drafts tokens."""

    accepted_prediction_tokens: Annotated[
        int, Field(ge=0, description="drafted tokens that are a part of the output")
    ]
    rejected_prediction_tokens: Annotated[
        int, Field(ge=0, description="drafted tokens that are not; no part of completion_tokens")
    ]


class Usage(EmbeddingUsage):
    """Number of tokens: each prompt once, and every choice that was generated."""

    completion_tokens: Count
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class CompletionLogprobs(TypedDict):
    """Parallel lists with an entry for each token; null at the first token of an echoed prompt."""

    text_offset: Annotated[
        list[Count], Field(description="where the token's text begins, in characters")
    ]
    token_logprobs: list[LogProbability | None]
    tokens: list[str]
    top_logprobs: list[dict[str, LogProbability] | None]


class PromptLogprob(TypedDict):
    """The log-probability of a token at a position of the prompt."""

    logprob: LogProbability
    rank: Annotated[int, Field(ge=1)]
    decoded_token: str


class DraftedTokens(TypedDict):
    """The tokens that speculative decoding has drafted, if requested."""

    drafted_token_ids: NotRequired[
        Annotated[
            list[TokenId | None] | None,
            Field(description="one in the place of each token; null if the server drafts none"),
        ]
    ]


class Choice(DraftedTokens):
    """What a choice has at every endpoint."""

    finish_reason: FinishReason | None
    stop_reason: StopReason
    token_ids: list[TokenId] | None


class PromptFields(TypedDict):
    """What a response says of its prompt; null if not requested."""

    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    prompt_token_ids: list[TokenId] | None


class CompletionChoice(Choice, PromptFields):
    """One choice, or in a stream what is new of it."""

    index: Annotated[int, Field(ge=0, description="prompt by prompt, n to each")]
    text: str
    logprobs: CompletionLogprobs | None


class Completion(ResponseHead):
    """The response of POST /v1/completions."""

    object: Literal["text_completion"]
    service_tier: None
    system_fingerprint: None
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(ResponseHead):
    """A chunk of a streamed response."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TokenLogprob(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: LogProbability
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatTokenLogprob(TokenLogprob):
    """A token, with the most likely tokens at its position."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """An entry for each token."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """The generated message, with the role of the message that it continues, if any.

    The keys after `content` are those of other servers and always null.
    """

    role: Role
    content: str
    refusal: None
    annotations: None
    audio: None
    function_call: None
    reasoning: None


class ChatChoice(Choice):
    """One choice."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(ResponseHead, PromptFields):
    """The response of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    service_tier: None
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What is new of a message; the first chunk of a choice has the role and no text."""

    role: NotRequired[Role]
    content: NotRequired[str]


class ChatChunkChoice(Choice):
    """What is new of one choice."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(ResponseHead):
    """A chunk of a streamed response; the first one has the requested fields about the prompt."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]
    prompt_token_ids: NotRequired[list[TokenId]]


class OutputText(TypedDict):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[None], Field(max_length=0)]
    logprobs: Annotated[list[None], Field(max_length=0)]


class OutputMessage(TypedDict):
    """The generated message."""

    id: str
    type: Literal["message"]
    status: ResponseStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputTokensDetails(TypedDict):
    """Details of the output tokens."""

    reasoning_tokens: Literal[0]


class ResponseUsage(TypedDict):
    """Number of tokens."""

    input_tokens: Count
    input_tokens_details: PromptTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class IncompleteDetails(TypedDict):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why a response failed."""

    code: Annotated[
        str,
        Field(
            description="server_error for a 500, otherwise the `type` of other endpoints' errors",
            json_schema_extra={
                "enum": [
                    "server_error",
                    *("BadRequestError", "RateLimitError"),
                    *("ServiceUnavailableError", "TimeoutError"),
                ]
            },
        ),
    ]
    message: str


class ModelResponse(TypedDict):
    """A response of POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: Time
    status: ResponseStatus
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: Annotated[bool, Field(description="whether the server keeps it")]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Literal["auto", "none"]
    tools: Annotated[list[None], Field(max_length=0)]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class DeletedResponse(TypedDict):
    """The response of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseEvent(TypedDict):
    """An event of a streamed response; `type` tells which of the other fields it has."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: Count
    response: NotRequired[ModelResponse]
    item: NotRequired[OutputMessage]
    item_id: NotRequired[str]
    output_index: NotRequired[Literal[0]]
    content_index: NotRequired[Literal[0]]
    part: NotRequired[OutputText]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[Annotated[list[None], Field(max_length=0)]]
