"""What the server answers, as types: mypy checks what the routes build, /openapi.json describes it, and nothing is done while it serves."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]
Time = Annotated[int, Field(ge=0, description="seconds since 1970")]
LogProbability = Annotated[float, Field(ge=-9999, description="natural; -9999 for minus infinity")]
FinishReason = Annotated[str, Field(json_schema_extra={"enum": ["stop", "length"]})]
Role = Literal["system", "developer", "user", "assistant"]
StopReason = Annotated[
    int | str | None,
    Field(description="the stop text or token that ended it; null for the end of text"),
]


class Health(TypedDict):
    """The engine serves."""

    status: Literal["ready"]


class Version(TypedDict):
    """The server's version."""

    version: str


class Load(TypedDict):
    """How busy the server is."""

    server_load: Annotated[int, Field(ge=0, description="sequences that run or wait")]
    queued_requests: Annotated[int, Field(ge=0, description="unfinished answers")]
    max_queued_requests: Annotated[int, Field(ge=1, description="how many there may be")]
    queued_tokens: Annotated[
        int,
        Field(
            ge=0,
            description="what unfinished requests may come to, prompts and max_tokens together",
        ),
    ]
    max_queued_tokens: Annotated[int, Field(ge=0, description="how much that may be")]


class Model(TypedDict):
    """The served model under one of its names."""

    id: str
    object: Literal["model"]
    created: Time
    owned_by: str
    root: Annotated[str, Field(description="the first of its names")]
    max_model_len: Annotated[int, Field(ge=1, description="tokens of the context")]


class ModelList(TypedDict):
    """The served model under each of its names."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """Token ids of a text."""

    count: Count
    max_model_len: Annotated[int, Field(ge=1, description="tokens of the context")]
    tokens: list[TokenId]
    token_strs: Annotated[
        list[str] | None,
        Field(description="each as the vocabulary spells it, where they were asked for"),
    ]


class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(TypedDict):
    """What a program has to know that lets the server tokenise for it."""

    bos_token: str | None
    eos_token: str | None
    eos_token_ids: list[TokenId]
    special_tokens: dict[str, TokenId]
    vocab_size: Annotated[int, Field(ge=1)]
    model_max_length: Annotated[int, Field(ge=1, description="tokens of the context")]


class EmbeddingUsage(TypedDict):
    """Tokens that were read."""

    prompt_tokens: Count
    total_tokens: Count


class Embedding(TypedDict):
    """One input as a vector of length 1."""

    object: Literal["embedding"]
    index: Count
    embedding: Annotated[
        list[float] | str, Field(description="as text: base64 of little-endian float32 numbers")
    ]


class EmbeddingList(TypedDict):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class PromptTokensDetails(TypedDict):
    """Of the prompts' tokens."""

    cached_tokens: Annotated[int, Field(ge=0, description="found in the prefix cache")]


class Usage(TypedDict):
    """Tokens counted: each prompt once, every answer that was asked for."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Parallel lists with an entry for each token; null where there is no probability, at the first token of an echoed prompt."""

    text_offset: Annotated[
        list[Count], Field(description="where the token's text begins, in characters")
    ]
    token_logprobs: list[LogProbability | None]
    tokens: list[str]
    top_logprobs: list[dict[str, LogProbability] | None]


class PromptLogprob(TypedDict):
    """A token that might stand at a position of the prompt."""

    logprob: LogProbability
    rank: Annotated[int, Field(ge=1)]
    decoded_token: str


class CompletionChoice(TypedDict):
    """One answer, or what is new of it in a stream."""

    index: Annotated[int, Field(ge=0, description="prompt by prompt, n to each")]
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    prompt_token_ids: list[TokenId] | None
    token_ids: list[TokenId] | None


class Completion(TypedDict):
    """The whole answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: Time
    model: str
    service_tier: None
    system_fingerprint: None
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(TypedDict):
    """A piece of a streamed answer."""

    id: str
    object: Literal["text_completion"]
    created: Time
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TokenLogprob(TypedDict):
    """A token and its log-probability."""

    token: str
    logprob: LogProbability
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, with the most likely ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    """An entry for each token."""

    content: list[ChatTokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    """The generated message; its role is another than the assistant's where it continues such a message.

    The keys after `content` are those of other servers and always null.
    """

    role: Role
    content: str
    refusal: None
    annotations: None
    audio: None
    function_call: None
    reasoning: None


class ChatChoice(TypedDict):
    """One answer."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason
    token_ids: list[TokenId] | None


class ChatPrompt(TypedDict):
    """The fields of a chat's answer about the prompt; null where they were not asked for."""

    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None
    prompt_token_ids: list[TokenId] | None


class ChatCompletion(ChatPrompt):
    """The whole answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: Time
    model: str
    service_tier: None
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What is new of a message; the first chunk of a choice has the role and no text."""

    role: NotRequired[Role]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """What is new of one answer."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason
    token_ids: list[TokenId] | None


class ChatCompletionChunk(TypedDict):
    """A piece of a streamed answer; the first one has the fields about the prompt that were asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Time
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]
    prompt_token_ids: NotRequired[list[TokenId]]
