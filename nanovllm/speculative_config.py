"""SpeculativeConfig: how tokens are drafted for speculative decoding, with the names of vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Interval

from nanovllm.checked_fields import check_fields, short_repr
from nanovllm.errors import InvalidRequestError
from nanovllm.vllm_settings import advice, suggests_fields

MAX_DRAFTED = 32
MAX_NGRAM = 16
SpeculativeMethod: TypeAlias = Literal["ngram", "draft_model"]
NgramLength: TypeAlias = Annotated[int, Interval(ge=1, le=MAX_NGRAM)]


@suggests_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are drafted; raises InvalidRequestError naming the value and the limit.

    Attributes:
        method: "ngram" repeats what followed the last tokens where they occurred before,
            "draft_model" asks a smaller model. None for a draft model where `model` names one, and
            else n-grams. "ngram" with a `model` takes the drafts that should gain more.
        model: folder or name of the draft model, which has the vocabulary of the model; None for
            none.
        num_speculative_tokens: maximum tokens that are drafted for a sequence in a step; fewer are
            where they would not pay.
        prompt_lookup_min: tokens of the shortest n-gram that is looked up.
        prompt_lookup_max: tokens of the longest n-gram that is looked up.
        dtype: type of the draft model's weights; None for that of the model.
        quantization: quantization of the draft model; None for that of the model, or for none where
            `dtype` is set.
    """

    method: SpeculativeMethod | None = None
    model: str | None = None
    num_speculative_tokens: Annotated[int, Interval(ge=1, le=MAX_DRAFTED)] = 5
    prompt_lookup_min: NgramLength = 2
    prompt_lookup_max: NgramLength = 4
    dtype: Literal["float32", "bfloat16"] | None = None
    quantization: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise InvalidRequestError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, more than prompt_lookup_max "
                f"({self.prompt_lookup_max}); lower the first or raise the second",
                param="prompt_lookup_min",
            )
        if self.method == "draft_model" and self.model is None:
            raise InvalidRequestError(
                'method is "draft_model", but no model is named; set model to a folder or a name',
                param="model",
            )
        unused = ([] if self.uses_ngrams else ["prompt_lookup_min", "prompt_lookup_max"]) + (
            ["dtype", "quantization"] if self.model is None else []
        )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unused and value != field.default:
                remedy = 'set method to "ngram"' if self.model else "set model"
                raise InvalidRequestError(
                    f"{field.name} is {value!r}, but has no effect here; leave it out, or {remedy}",
                    param=field.name,
                )

    @property
    def uses_ngrams(self) -> bool:
        """Whether n-grams are looked up."""
        return self.method == "ngram" or self.model is None

    @classmethod
    def of(cls, settings: Any) -> "SpeculativeConfig | None":
        """Return settings given as a mapping, as those of vLLM are; None for None."""
        if settings is None or isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping):
            raise InvalidRequestError(
                f"speculative_config is {short_repr(settings)} but must be a mapping, such as "
                '{"method": "ngram", "num_speculative_tokens": 5}',
                param="speculative_config",
            )
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise InvalidRequestError(
                    f"speculative_config has {short_repr(name)}: {advice(str(name), known)}",
                    param="speculative_config",
                )
        try:
            return cls(**settings)
        except InvalidRequestError as error:
            raise error.at("speculative_config", param="speculative_config") from None
