"""What one request asks of the sampler: the names, defaults and ranges that people know from vLLM and OpenAI."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from nanovllm.errors import InvalidRequestError
from nanovllm.structured_outputs import StructuredOutputs

GREEDY_TEMPERATURE = 1e-5  # below this, dividing the logits by it would overflow float32 and only the best could be drawn
MAX_BEST_OF = 20  # OpenAI's own limit: answers that are computed to be thrown away
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = (
    1000  # of one stop string: each new piece of text is compared with all of its beginnings
)
MAX_BAD_WORD_CHARACTERS = 1000  # of one text
MAX_BAD_WORDS_CHARACTERS = 1 << 16  # of all of them, each of which is tokenized twice
MAX_LOGIT_EDITS = 1024  # entries of logit_bias, of bad_words and of stop_token_ids: what one request may make a step do
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1
MAX_TOP_K = 2**31 - 1  # more than any vocabulary has, and small enough for the sampler's arrays
MAX_PROMPT_TOKENS = 2**31 - 1  # more than any context has
MAX_ALLOWED_TOKENS = 1 << 18  # more than vocabularies have
MIN_REPETITION_PENALTY = 1e-5  # logits are divided by it: a smaller one could overflow float32
MAX_REPETITION_PENALTY = 100.0
TruncationSide: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one request; raises InvalidRequestError naming the value and the limit.

    Attributes:
        n: number of answers to the prompt.
        best_of: generate so many answers, n to 20, and give the n best: those whose tokens have the highest mean log-probability; None for n.
        truncate_prompt_tokens: most tokens of the prompt that are read; -1 for as many as fit with
            max_tokens; None for all.
        truncation_side: the end of a longer prompt that is cut off: "left" keeps its last tokens,
            "right" its first.
        add_special_tokens: let the tokenizer put its special tokens around a prompt given as text, where it has any; GPT-2's has none.
        max_tokens: most tokens to generate, fewer where the context is full; None for as many as it has room for; 0 only reads the prompt.
        min_tokens: no end-of-text, stop token or stop string before this many tokens.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: draw among the k most likely tokens; 0 or -1 for all of them.
        top_p: draw among the most likely tokens whose probabilities first add up to this.
        min_p: drop tokens less likely than this fraction of the most likely one.
        repetition_penalty: > 1 makes tokens of the prompt and the answer less likely (CTRL, Keskar et al. 2019, section 4.1).
        presence_penalty: subtracted once from the logit of every token that the answer already has.
        frequency_penalty: subtracted from it as often as the answer has the token.
        logit_bias: {token id: value added to its logit}.
        allowed_token_ids: only these may be generated.
        bad_words: texts that must not be generated.
        seed: the same seed gives the same answer, whatever else is in the batch; None draws one.
        stop: text that ends the answer and is cut off, one string or several.
        stop_token_ids: tokens that end the answer.
        ignore_eos: go on after end-of-text.
        include_stop_str_in_output: keep the stop text in the answer.
        skip_special_tokens: leave tokens such as `<|endoftext|>` out of the text.
        logprobs: log-probabilities of this many most likely tokens at each position, and of the one chosen.
        prompt_logprobs: the same for the tokens of the prompt.
        structured_outputs: the form of the answer.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = None
    seed: int | None = None
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide = "left"
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if (number := _to_python(value)) is not value:
                object.__setattr__(self, field.name, number)
        self._check_numbers()
        self._check_flags()
        self._normalise_lists()
        self._check_against_each_other()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken without a draw."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def num_candidates(self) -> int:
        """Answers that are generated; the n best of them are given."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_sequences(self) -> int:
        """Sequences that are computed: greedy answers are all equal, so that one stands for all of them."""
        return 1 if self.is_greedy else self.num_candidates

    @property
    def ranks_answers(self) -> bool:
        """Whether more sequences are computed than answers given, so that none can be given before all have ended."""
        return self.num_sequences > self.n

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return _as_tuple("stop", self.stop)

    def _check_numbers(self) -> None:
        whole = {"n": (1, 128), "min_tokens": (0, None), "top_k": (-1, MAX_TOP_K)}
        optional = {
            "max_tokens": (0, None), "seed": (MIN_SEED, MAX_SEED), "logprobs": (0, None), "prompt_logprobs": (0, None),
            "best_of": (1, MAX_BEST_OF), "truncate_prompt_tokens": (-1, MAX_PROMPT_TOKENS),
        }  # fmt: skip
        for name, (low, high) in whole.items():
            _check_whole(name, getattr(self, name), low, high)
        for name, (low, high) in optional.items():
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), low, high)
        real = {
            "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
            "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY), "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
        }  # fmt: skip
        for name, (bottom, top) in real.items():
            _check_real(name, getattr(self, name), bottom, top)
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.top_p == 0:
            raise InvalidRequestError(
                "top_p is 0 but must be above 0; leave it out for 1", param="top_p"
            )
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "add_special_tokens",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequestError(
                    f"{name} is {_short(value)} but must be true or false", param=name
                )

    def _normalise_lists(self) -> None:
        """Check the items of every collection, and keep a copy that its giver cannot change."""
        for name, limit, longest in (
            ("stop", MAX_STOP_STRINGS, MAX_STOP_CHARACTERS),
            ("bad_words", MAX_LOGIT_EDITS, MAX_BAD_WORD_CHARACTERS),
        ):
            texts = _as_tuple(name, getattr(self, name))
            _check_length(name, texts, limit)
            _check_texts(name, texts, longest)
            object.__setattr__(self, name, texts)
        for name in ("stop_token_ids", "allowed_token_ids"):
            given = getattr(self, name)
            if given is not None:
                ids = _as_tuple(name, given)
                _check_length(
                    name, ids, MAX_LOGIT_EDITS if name == "stop_token_ids" else MAX_ALLOWED_TOKENS
                )
                for token_id in ids:
                    _check_whole(name, token_id, 0, None)
                if name == "allowed_token_ids" and not ids:
                    raise InvalidRequestError(
                        "allowed_token_ids is empty, so no token could be generated; leave it out to allow all",
                        param=name,
                    )
                object.__setattr__(self, name, tuple(dict.fromkeys(ids)))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def _check_against_each_other(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} but max_tokens only {self.max_tokens}; lower the first or raise the second",
                param="min_tokens",
            )
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputs):
                raise InvalidRequestError(
                    "structured_outputs must be a StructuredOutputs", param="structured_outputs"
                )
            for name in ("ignore_eos", "min_tokens"):
                if getattr(self, name):
                    message = f"{name} cannot be combined with structured_outputs, whose end is the end of the answer; leave one of them out"
                    raise InvalidRequestError(message, param=name)
        check_best_of(self.best_of, self.n)
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens is 0 but must be at least 1, or -1 for as many as fit; leave it out to read the whole prompt",
                param="truncate_prompt_tokens",
            )
        if self.truncation_side not in get_args(TruncationSide):
            raise InvalidRequestError(
                f"truncation_side is {_short(self.truncation_side)} but must be 'left' or 'right'",
                param="truncation_side",
            )

    def clone(self, **changes: Any) -> "SamplingParams":
        """Return a copy, with these settings changed: `params.clone(max_tokens=32)`. Raises as the class."""
        return SamplingParams(**{**self.as_dict(), **changes})

    def as_dict(self) -> dict[str, Any]:
        """Return every setting by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def list_params(
    params: SamplingParams | Iterable[SamplingParams], num_prompts: int
) -> list[SamplingParams]:
    """Return the settings of each prompt; raises InvalidRequestError where `params` has not as many."""
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    listed = list(params) if isinstance(params, Iterable) else [params]
    if not isinstance(params, Iterable) or not all(
        isinstance(one, SamplingParams) for one in listed
    ):
        raise InvalidRequestError(
            f"sampling_params is a {type(params).__name__} but must be a SamplingParams, or a list of them"
        )
    if len(listed) != num_prompts:
        raise InvalidRequestError(
            f"there are {num_prompts} prompts but {len(listed)} sampling_params; give one for all, or one for each"
        )
    return listed


def check_best_of(best_of: int | None, n: int) -> None:
    """Raise InvalidRequestError where more answers are to be given than generated."""
    if best_of is not None and best_of < n:
        raise InvalidRequestError(
            f"best_of is {best_of} but n is {n}, the number of answers to give; raise the first",
            param="best_of",
        )


def check_unicode(name: str, text: str) -> None:
    """Raise InvalidRequestError where `text` has half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{name} has {text[error.start]!r} at character {error.start}"
        raise InvalidRequestError(
            f"{found}, half of a surrogate pair, which is no character; send valid Unicode",
            param=name,
        ) from None


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name} is {_short(value)} but must be a list", param=name)
    return tuple(item if isinstance(item, int | str) else _to_python(item) for item in value)


def _to_python(value: Any) -> Any:
    """Return the number in a NumPy scalar, anything else as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _check_length(name: str, items: tuple[Any, ...], limit: int) -> None:
    if len(items) > limit:
        raise InvalidRequestError(
            f"{name} has {len(items)} entries, the limit is {limit}", param=name
        )


def _check_texts(name: str, texts: tuple[Any, ...], longest: int) -> None:
    for text in texts:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(
                f"{name} has {_short(text)} but takes texts that are not empty", param=name
            )
        check_unicode(name, text)
        if len(text) > longest:
            raise InvalidRequestError(
                f"{name} has a text of {len(text)} characters, the limit is {longest}", param=name
            )
    total = sum(map(len, texts))
    if total > MAX_BAD_WORDS_CHARACTERS:
        raise InvalidRequestError(
            f"{name} has {total} characters in all, the limit is {MAX_BAD_WORDS_CHARACTERS}",
            param=name,
        )


def _range(low: float | None, high: float | None) -> str:
    return f"at least {low}" if high is None else f"from {low} to {high}"


def _check_whole(name: str, value: object, low: int, high: int | None) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        raise InvalidRequestError(
            f"{name} is {_short(value)} but must be a whole number, {_range(low, high)}", param=name
        )


def _check_real(name: str, value: object, low: float, high: float, owner: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequestError(
            f"{name}{owner} is {_short(value)} but must be a number, {_range(low, high)}",
            param=name,
        )


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(
            f"logit_bias is {_short(bias)} but must map token ids to numbers", param="logit_bias"
        )
    if len(bias) > MAX_LOGIT_EDITS:
        raise InvalidRequestError(
            f"logit_bias has {len(bias)} entries, the limit is {MAX_LOGIT_EDITS}",
            param="logit_bias",
        )
    bias = {_to_python(token_id): _to_python(value) for token_id, value in bias.items()}
    for token_id, value in bias.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise InvalidRequestError(
                f"logit_bias has the key {_short(token_id)} but its keys must be token ids",
                param="logit_bias",
            )
        _check_real("logit_bias", value, -100.0, 100.0, f" of token {token_id}")
    return {token_id: float(value) for token_id, value in bias.items()}
