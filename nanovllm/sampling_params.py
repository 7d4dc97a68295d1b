"""SamplingParams: settings of a request, with the names, defaults and ranges of vLLM and OpenAI.

A setting is declared here once: its type and bounds, its default and its text. The fields of HTTP
bodies and run-batch, their OpenAPI document and the checks of Python callers follow from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Interval

from nanovllm.checked_fields import check_fields, short_repr, to_python
from nanovllm.errors import InvalidRequestError, counted, listed, setting
from nanovllm.structured_outputs import StructuredOutputs
from nanovllm.vllm_settings import suggests_fields

GREEDY_TEMPERATURE = 1e-5  # below this, logits / temperature may overflow float32
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000  # per stop string
MAX_BAD_WORD_CHARACTERS = 1000  # per bad word
MAX_BAD_WORDS_CHARACTERS = 1 << 16  # in total; each bad word is tokenized twice
MAX_LOGIT_EDITS = 1024  # entries of logit_bias, bad_words and stop_token_ids each
MAX_BIAS = 100
MAX_ALLOWED_TOKENS = 1 << 18
MAX_COUNT = 2**31 - 1  # the sampler's arrays are int32

Temperature: TypeAlias = Annotated[float, Interval(ge=0, le=2)]  # as OpenAI: above, text is noise
TopP: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Interval(ge=-1, le=MAX_COUNT)]
Fraction: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
# Below 1e-5, logits / penalty may overflow float32.
RepetitionPenalty: TypeAlias = Annotated[float, Interval(ge=1e-5, le=100)]
Penalty: TypeAlias = Annotated[float, Interval(ge=-2, le=2)]
Seed: TypeAlias = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]
Choices: TypeAlias = Annotated[int, Interval(ge=1, le=128)]
BestOf: TypeAlias = Annotated[int, Interval(ge=1, le=20)]  # as OpenAI: most are discarded
Count: TypeAlias = Annotated[int, Interval(ge=0, le=MAX_COUNT)]
TruncatedLength: TypeAlias = Annotated[int, Interval(ge=-1, le=MAX_COUNT)]
TruncationSide: TypeAlias = Literal["left", "right"]

MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings whose default a model may set in its generation_config.json."""


@suggests_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one request; raises InvalidRequestError naming the value and the limit.

    Attributes:
        n: number of choices.
        best_of: number of choices to generate, n to 20; the n with the highest mean log-probability
            per token are returned. None for n.
        max_tokens: maximum number of tokens to generate, fewer where the context is full; None for
            as many as fit into the context; 0 to process the prompt only.
        min_tokens: minimum number of tokens before end-of-text, a stop token or a stop string.
        temperature: divisor of the logits; 0 for greedy sampling.
        top_k: sample from the k most likely tokens; 0 or -1 for all.
        top_p: sample from the smallest set of most likely tokens with this total probability.
        min_p: minimum probability of a token, relative to the most likely one.
        repetition_penalty: above 1 makes tokens of the prompt and the output less likely. From
            CTRL, Keskar et al. 2019, section 4.1.
        presence_penalty: subtracted from the logit of every token in the output.
        frequency_penalty: subtracted from the logit of a token for each occurrence in the output.
        logit_bias: {token id: value added to its logit}.
        allowed_token_ids: the only tokens that may be generated.
        bad_words: texts that must not be generated.
        seed: equal seeds give equal outputs, independent of the batch; None for a random one.
        stop: one or several stop strings, which end the output and are removed from it.
        stop_token_ids: tokens that end the output.
        ignore_eos: continue after the end-of-text token.
        include_stop_str_in_output: keep the stop string in the output.
        skip_special_tokens: omit tokens such as `<|endoftext|>` from the text.
        logprobs: number of most likely tokens to report at each position, with their
            log-probabilities and that of the sampled token.
        prompt_logprobs: the same for each token of the prompt.
        structured_outputs: format of the output.
        speculative: draft tokens for this request, where the engine does; no bit of the output
            depends on it.
        truncate_prompt_tokens: maximum number of prompt tokens; -1 for as many as fit with
            max_tokens; None for all.
        truncation_side: side on which a longer prompt is cut: "left" keeps its last tokens,
            "right" its first.
        add_special_tokens: add the tokens that the tokenizer puts around every text to a prompt of
            text. GPT-2's has none.
    """

    n: Choices = 1
    best_of: BestOf | None = None
    max_tokens: Annotated[int, Interval(ge=0)] | None = 16
    min_tokens: Count = 0
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: Fraction = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = None
    seed: Seed | None = None
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: Count | None = None
    prompt_logprobs: Count | None = None
    structured_outputs: StructuredOutputs | None = None
    speculative: bool = True
    truncate_prompt_tokens: TruncatedLength | None = None
    truncation_side: TruncationSide = "left"
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        self._normalize_lists()
        self._check_combinations()

    @property
    def is_greedy(self) -> bool:
        """Whether sampling takes the most likely token."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_candidates(self) -> int:
        """Number of choices to generate, of which the n best are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_sequences(self) -> int:
        """Number of sequences to compute: one for all greedy choices, which are equal."""
        return 1 if self.is_greedy else self.num_candidates

    @property
    def ranks_choices(self) -> bool:
        """Whether choices are ranked, and so returned only after all sequences have ended."""
        return self.num_sequences > self.n

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens of prompt and output."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return _as_tuple("stop", self.stop)

    def _normalize_lists(self) -> None:
        """Check and copy all collections, so that the caller cannot change them."""
        for name, max_texts, max_characters in (
            ("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
            ("bad_words", MAX_LOGIT_EDITS, MAX_BAD_WORD_CHARACTERS),
        ):
            texts = _as_tuple(name, getattr(self, name))
            _check_length(name, texts, max_texts)
            _check_texts(name, texts, max_characters)
            object.__setattr__(self, name, texts)
        for name, max_ids in (
            ("stop_token_ids", MAX_LOGIT_EDITS),
            ("allowed_token_ids", MAX_ALLOWED_TOKENS),
        ):
            if getattr(self, name) is not None:
                ids = _as_tuple(name, getattr(self, name))
                _check_length(name, ids, max_ids)
                for token_id in ids:
                    if not _is_token_id(token_id):
                        raise InvalidRequestError(
                            f"{name} has {short_repr(token_id)}, but a token id must be an "
                            "integer, at least 0",
                            param=name,
                        )
                object.__setattr__(self, name, tuple(dict.fromkeys(ids)))
        if self.allowed_token_ids == ():
            raise InvalidRequestError(
                "allowed_token_ids is empty, so no token could be generated; leave it out to "
                "allow all",
                param="allowed_token_ids",
            )
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def _check_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} but {setting('max_tokens')} only "
                f"{self.max_tokens}",
                remedy="lower the first or raise the second",
                param="min_tokens",
            )
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputs):
                raise InvalidRequestError(
                    f"{setting('structured_outputs')} must be a StructuredOutputs",
                    param="structured_outputs",
                )
            for name in ("ignore_eos", "min_tokens"):
                if getattr(self, name):
                    raise InvalidRequestError(
                        f"{name} cannot be combined with {setting('structured_outputs')}, which "
                        "end where their grammar does",
                        remedy="leave one of them out",
                        param=name,
                    )
        check_best_of(self.best_of, self.n)
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens is 0 but must be at least 1, or -1 for as many as fit; "
                "leave it out to keep the whole prompt",
                param="truncate_prompt_tokens",
            )

    def clone(self, **changes: Any) -> "SamplingParams":
        """Return a copy with some settings changed, such as `params.clone(max_tokens=32)`."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return every setting by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def list_params(
    params: SamplingParams | Iterable[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """Return the settings of each prompt. Raises InvalidRequestError if the numbers differ."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    listed: list[Any] = list(params) if isinstance(params, Iterable) else [params]
    if not isinstance(params, Iterable) or not all(
        isinstance(item, SamplingParams) for item in listed
    ):
        raise InvalidRequestError(
            f"sampling_params is a {type(params).__name__} but must be a SamplingParams, or a list "
            "of them"
        )
    if len(listed) != num_prompts:
        raise InvalidRequestError(
            f"there are {len(listed)} sampling_params for {counted(num_prompts, 'prompt')}; pass "
            "one for all, or one for each"
        )
    return listed


def check_best_of(best_of: int | None, n: int) -> None:
    """Raise InvalidRequestError where best_of is less than n."""
    if best_of is not None and best_of < n:
        raise InvalidRequestError(
            f"best_of is {best_of} but n is {n}, the number of choices to return; raise the first",
            param="best_of",
        )


def check_unicode(name: str, text: str) -> None:
    """Raise InvalidRequestError for half of a surrogate pair, which JSON can escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{name} has {text[error.start]!r} at character {error.start}, half of a surrogate "
            "pair, which is not a character; send valid Unicode",
            param=name,
        ) from None


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} is {short_repr(value)} but must be a list", param=name)
    return tuple(item if isinstance(item, int | str) else to_python(item) for item in value)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_length(name: str, items: tuple[Any, ...], limit: int) -> None:
    if len(items) > limit:
        raise InvalidRequestError(
            f"{name} has {len(items)} entries, the limit is {limit}", param=name
        )


def _check_texts(name: str, texts: tuple[Any, ...], max_characters: int) -> None:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(
                f"{name} has {short_repr(text)} but takes texts that are not empty", param=name
            )
        check_unicode(name, text)
        if len(text) > max_characters:
            raise InvalidRequestError(
                f"{name} has a text of {len(text)} characters, the limit is {max_characters}",
                param=name,
            )
    total = sum(map(len, texts))
    if total > MAX_BAD_WORDS_CHARACTERS:
        raise InvalidRequestError(
            f"{name} has {total} characters in total, the limit is {MAX_BAD_WORDS_CHARACTERS}",
            param=name,
        )


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(
            f"logit_bias is {short_repr(bias)} but must map token ids to numbers",
            param="logit_bias",
        )
    if len(bias) > MAX_LOGIT_EDITS:
        raise InvalidRequestError(
            f"logit_bias has {len(bias)} entries, the limit is {MAX_LOGIT_EDITS}",
            param="logit_bias",
        )
    bias = {to_python(token_id): to_python(value) for token_id, value in bias.items()}
    wrong = [key for key in bias if not _is_token_id(key)]
    if wrong:
        raise InvalidRequestError(
            f"logit_bias has keys that are not token ids: {listed(map(short_repr, wrong))}",
            param="logit_bias",
        )
    for token_id, value in bias.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -MAX_BIAS <= value <= MAX_BIAS:
            raise InvalidRequestError(
                f"logit_bias of token {token_id} is {short_repr(value)} but must be a number, from "
                f"{-MAX_BIAS} to {MAX_BIAS}",
                param="logit_bias",
            )
    return {token_id: float(value) for token_id, value in bias.items()}
