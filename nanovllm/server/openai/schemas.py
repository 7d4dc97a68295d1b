"""The fields of bodies: those of /v1/completions, and those that several endpoints have.

Names and ranges are those of OpenAI, the extensions those of vLLM. A field that is not listed is
refused by name, unless it is null: null means left out, wherever a field is optional. Some fields
of OpenAI are accepted and have no effect. The settings of SamplingParams are fields with its
bounds. It also checks the entries of lists, which are only described here, in JSON schemas.
Checking costs little however large the body is: it ends at the first fault of a list, and a body
with too many fields is refused as a whole.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from pydantic import (
    BeforeValidator,
    Field,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from nanovllm.checked_fields import checked_fields
from nanovllm.engine.generation_request import LengthPenalty
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BIAS,
    MAX_COUNT,
    MAX_LOGIT_EDITS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MODEL_DEFAULTS,
    Count,
    SamplingParams,
    TruncatedLength,
)
from nanovllm.server.http.bounded_model import INTEGERS, BoundedModel, JSONObject, at_most
from nanovllm.server.openai.prompts import Prompts, check_prompts, list_prompts
from nanovllm.server.openai.structured import (
    ResponseFormat,
    StructuredFields,
    structured_field_names,
)

DEFAULT_MAX_TOKENS = 16
MAX_METADATA = 100
NO_EFFECT = "accepted, and without effect"
STREAM = "send the output as server-sent events while it is generated"
PRIORITY = "lower numbers run first; needs --scheduling-policy priority"
CACHE_SALT = "cached prefixes are shared within one salt only"
MAX_TOKENS = "maximum tokens to generate; by default what the context has room for"
SPECIAL_TOKENS = "add the tokens that the tokenizer puts around a text; GPT-2's puts none"

TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]


def _as_list(value: object) -> object:
    """Return a text as a list; a union type would report two errors for one fault."""
    return [value] if isinstance(value, str) else value


StopTokenIds = Annotated[
    list[TokenId],
    Field(fail_fast=True, json_schema_extra={"maxItems": MAX_LOGIT_EDITS}),
    INTEGERS,
    at_most(MAX_LOGIT_EDITS),
]
AllowedTokenIds = Annotated[
    list[TokenId],
    Field(fail_fast=True, json_schema_extra={"minItems": 1, "maxItems": MAX_ALLOWED_TOKENS}),
    INTEGERS,
    at_most(MAX_ALLOWED_TOKENS),
]
BadWord = Annotated[
    str,
    Field(min_length=1),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARACTERS}),
]
BadWords = Annotated[
    list[BadWord],
    Field(fail_fast=True, json_schema_extra={"maxItems": MAX_LOGIT_EDITS}),
    at_most(MAX_LOGIT_EDITS),
]
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_BIAS_SCHEMA = {
    "type": "object", "maxProperties": MAX_LOGIT_EDITS,
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "propertyNames": {"pattern": "^[0-9]{1,12}$"},
}  # fmt: skip
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(fail_fast=True),
    at_most(MAX_STOP_STRINGS),
    BeforeValidator(_as_list),
    WithJsonSchema(
        {
            "oneOf": [
                _STOP_SCHEMA,
                {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOP_STRINGS},
            ]
        }
    ),
]
LogitBias = Annotated[dict[str, float], at_most(MAX_LOGIT_EDITS), WithJsonSchema(_BIAS_SCHEMA)]
NotSupported = WithJsonSchema({"type": "null", "description": "not supported"})
Metadata = Annotated[
    JSONObject,
    at_most(MAX_METADATA),
    WithJsonSchema({"type": "object", "maxProperties": MAX_METADATA}),
]
TruncatePromptTokens = Annotated[
    TruncatedLength | None,
    Field(
        description="maximum tokens of a prompt that are read; -1 for as many as fit",
        json_schema_extra={"not": {"const": 0}},
    ),
]


def refuse(reason: str, accepted: object = None) -> BeforeValidator:
    """Return the validator of a field that must be null or `accepted`."""

    def check(value: object) -> object:
        if value is not None and (type(value) is not type(accepted) or value != accepted):
            raise ValueError(f"not supported: {reason}; leave it out")
        return value

    return BeforeValidator(check)


MaxTokens = Annotated[int, Interval(ge=1, le=MAX_COUNT)]
Label = Annotated[str, Field(max_length=1024)]
Priority = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)]
CacheSalt = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BoundedModel):
    """`stream_options`: usage at the end of a stream, or also in every chunk."""

    include_usage: bool = Field(False, description="send the usage in a last chunk without choices")
    continuous_usage_stats: bool = Field(
        False, description="usage of the choice so far on every chunk; needs include_usage"
    )
    include_obfuscation: bool = Field(False, description=NO_EFFECT)


class Body(BoundedModel):
    """The fields of every body."""

    model: str | None = Field(
        None, description="a served model's name; left out, the one that is served"
    )


class GenerationBody(Body):
    """What the shared path of all endpoints reads from a body; see endpoint.py."""

    @property
    def logged_prompts(self) -> Sequence[str | list[int]]:
        """The prompts, or the texts of messages, for the request log."""
        raise NotImplementedError

    @property
    def num_choices(self) -> int:
        """Number of choices that are generated for all prompts together."""
        raise NotImplementedError

    @property
    def is_streamed(self) -> bool:
        """Whether the response is a stream; not for endpoints without the field `stream`."""
        return bool(getattr(self, "stream", False))

    @property
    def requested_id(self) -> str | None:
        """Part of the response's id, from the field `request_id` of endpoints that have it."""
        return getattr(self, "request_id", None)

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        return {}


class UnusedFields(Body):
    """Fields of OpenAI's API without effect, accepted because programs send them."""

    user: Label | None = Field(None, description=NO_EFFECT)
    store: bool | None = Field(None, description=NO_EFFECT)
    metadata: Metadata | None = Field(None, description=NO_EFFECT)
    service_tier: Literal["auto", "default"] | None = Field(None, description=NO_EFFECT)
    safety_identifier: Label | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: Label | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        None, description=NO_EFFECT
    )


def setting_field(name: str) -> Any:
    """Return a field, None by default, with the description of a setting of SamplingParams."""
    return Field(None, description=checked_fields(SamplingParams)[name].help)


def _setting_fields() -> dict[str, tuple[Any, Any]]:
    """Return a field for each setting of SamplingParams that is a number, a flag or a choice.

    Its bounds and its description are stated there only. None stands for the model's default.
    """
    return {
        name: (
            setting.value_type,
            Field(None if name in MODEL_DEFAULTS else setting.default, description=setting.help),
        )
        for name, setting in checked_fields(SamplingParams).items()
        if setting.kind is not None or setting.choices
    }


if TYPE_CHECKING:

    class _Settings(GenerationBody):
        """The settings that this package reads itself; the others only reach SamplingParams."""

        n: int | None
        best_of: int | None
        ignore_eos: bool
        prompt_logprobs: int | None
        skip_special_tokens: bool

else:
    _Settings = create_model("_Settings", __base__=GenerationBody, **_setting_fields())


class SamplingBody(UnusedFields, _Settings):
    """The fields that completions and chats share: sampling, stop conditions and streaming.

    Every setting of SamplingParams is one of them; those below have another form in JSON.
    """

    stop: Stops | None = setting_field("stop")
    logit_bias: LogitBias | None = setting_field("logit_bias")
    stop_token_ids: StopTokenIds | None = setting_field("stop_token_ids")
    bad_words: BadWords | None = setting_field("bad_words")
    allowed_token_ids: AllowedTokenIds | None = setting_field("allowed_token_ids")
    truncate_prompt_tokens: TruncatePromptTokens = None
    response_format: ResponseFormat | None = Field(
        None, description="format of the output: text, json_object or json_schema"
    )
    structured_outputs: StructuredFields | None = setting_field("structured_outputs")

    stream: bool | None = Field(False, description=STREAM)
    stream_options: StreamOptions | None = Field(None, description="usage in a stream")
    priority: Priority = Field(0, description=PRIORITY)
    cache_salt: CacheSalt | None = Field(None, description=CACHE_SALT)
    request_id: str | None = Field(
        None,
        max_length=128,
        pattern=r"^[A-Za-z0-9._:-]+$",
        description="part of the response's id",
    )
    use_beam_search: bool = Field(
        False,
        description="return the most probable sequences, by max(n, best_of) beams, up to 10; not "
        "with fields about single tokens",
    )
    length_penalty: LengthPenalty | None = Field(
        None, description="for use_beam_search: above 1 favours long answers"
    )
    return_token_ids: bool | None = Field(
        False, description="add the token ids of the prompt and of each choice"
    )
    return_drafted_token_ids: bool | None = Field(
        False, description="add the token that was drafted in the place of each token"
    )
    return_tokens_as_token_ids: bool | None = Field(
        False, description='"token_id:123" instead of texts in logprobs'
    )

    needed_fields: ClassVar[Mapping[str, str]] = {
        "stream_options": "stream",
        "length_penalty": "use_beam_search",
        "return_drafted_token_ids": "return_token_ids",
        "return_tokens_as_token_ids": "logprobs",
    }
    """Fields that have an effect only together with another one, and which one."""

    @model_validator(mode="after")
    def _check_needed_fields(self) -> "SamplingBody":
        for name, needed in self.needed_fields.items():
            if _is_set(getattr(self, name)) and not _is_set(getattr(self, needed)):
                raise InvalidRequestError(
                    f"{name} is only allowed with {needed}; set {needed}, or leave {name} out",
                    param=name,
                )
        if self.stream and self.num_candidates > (self.n or 1):
            raise InvalidRequestError(
                f"best_of is {self.best_of} with n {self.n or 1}, and which answers are best is "
                "known once all are complete: they cannot be streamed; leave out stream or best_of",
                param="best_of",
            )
        return self

    @property
    def num_candidates(self) -> int:
        """Number of choices that are generated for a prompt, of which n are returned."""
        return self.best_of or self.n or 1

    @property
    def field_names(self) -> Mapping[str, str]:
        """The client's names of fields by the engine's, for error messages."""
        return {
            "beam_width": "n" if self.best_of is None else "best_of",
            **structured_field_names(self.response_format, self.structured_outputs),
        }


def _is_set(value: object) -> bool:
    """Return whether a field asks for something; 0 log-probabilities are those of the tokens."""
    return value is not None and value is not False


class CompletionRequest(SamplingBody):
    """The body of POST /v1/completions."""

    prompt: Prompts = Field(description="text, token ids, or a list of either")
    max_tokens: Count | None = Field(
        DEFAULT_MAX_TOKENS, description="maximum tokens to generate; 0 only with echo"
    )
    logprobs: Count | None = setting_field("logprobs")
    echo: bool | None = Field(
        False, description="put the prompt before the text, with its log-probabilities if requested"
    )
    suffix: Annotated[str, refuse("GPT-2 cannot fill in the middle", "")] | None = Field(
        None, description=NO_EFFECT, json_schema_extra={"maxLength": 0}
    )

    add_special_tokens: bool = Field(True, description=SPECIAL_TOKENS)

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: Any) -> Any:
        return check_prompts(value)

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError(
                "max_tokens is 0 but must be at least 1 unless echo is true", param="max_tokens"
            )
        return self

    @property
    def logged_prompts(self) -> list[str | list[int]]:
        """The prompts as the client sent them, for the request log."""
        return list_prompts(self.prompt)

    @property
    def num_choices(self) -> int:
        """Number of choices that are generated for all prompts together."""
        return len(self.logged_prompts) * self.num_candidates
