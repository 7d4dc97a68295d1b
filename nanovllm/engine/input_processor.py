"""InputProcessor: checks prompts and settings, and prepares requests for the engine.

Every error of a request is found before it is queued, and names the value, the limit and the
remedy. An accepted request can always run to its end.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

from nanovllm.engine.grammar.grammar import Grammars, RequestGrammar
from nanovllm.engine.logprobs import ENTRY_BYTES, POSITION_BYTES
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.pooling import Pooler
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.scheduling.request import Pooling, Request
from nanovllm.engine.scheduling.token_rules import TokenRules
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError, describe_value, listed
from nanovllm.model.config import GPT2Config
from nanovllm.prompts import Prompt, to_list, to_python_ids
from nanovllm.sampling_params import SamplingParams, TruncationSide, check_unicode

MAX_TRUNCATED_BYTES = 1 << 18
"""Maximum bytes of a text that is truncated. All of it is tokenized, in 200 times its memory."""
_USUAL_GROWTH = 4
"""Growth of a text in a tokenizer up to which the maximum holds; it is less for others."""

_MAX_CHECKED_CONTEXTS = 16
"""Contexts of token ids that are checked; a longer prompt is refused before."""

_Rules: TypeAlias = tuple[tuple[tuple[int, ...], ...], TokenRules]
"""Token ids of bad words, and the allowed, biased and banned tokens."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked prompt: its sequences for the engine, and the processor of their updates.

    `grammar` is compiled once the engine has a sequence, or `grammar.wait` is called.
    """

    requests: tuple[Request, ...]
    output_processor: OutputProcessor
    grammar: RequestGrammar | None = None

    @property
    def num_choices(self) -> int:
        """Number of choices, including those that best_of drops and those that share a sequence."""
        return self.requests[0].sampling.num_candidates

    @property
    def num_tokens(self) -> int:
        """Maximum total tokens: the prompt once, and max_tokens of each choice."""
        first = self.requests[0]
        return first.num_prompt_tokens + self.num_choices * first.max_new_tokens

    @property
    def logprobs_bytes(self) -> int:
        """Maximum memory for log-probabilities, in bytes."""
        first = self.requests[0]
        sampling = first.sampling
        reported = [
            (first.num_prompt_tokens, sampling.prompt_logprobs),
            (len(self.requests) * first.max_new_tokens, sampling.logprobs),
        ]
        return sum(
            positions * (POSITION_BYTES + ENTRY_BYTES * (count + 1))
            for positions, count in reported
            if count is not None
        )


@contextmanager
def naming_prompt(index: int, count: int) -> Iterator[None]:
    """Add the index of the prompt to an InvalidRequestError, if there are several prompts."""
    try:
        yield
    except InvalidRequestError as error:
        if count == 1:
            raise
        raise error.at(f"prompt {index}") from error.__cause__


class InputProcessor:
    """Checks requests and draws their seeds. May be used from any thread."""

    def __init__(
        self, model: GPT2Config, tokenizer: Tokenizer, limits: Limits, *, seed: int | None = None
    ) -> None:
        """Create an input processor; `seed` seeds the seeds of requests that have none."""
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self._random = random.Random(seed)  # noqa: S311 - seeds for sampling, no secrets
        self._max_token_bytes = tokenizer.max_token_bytes
        growth = max(tokenizer.growth, _USUAL_GROWTH)
        self._max_truncated_bytes = MAX_TRUNCATED_BYTES * _USUAL_GROWTH // growth
        self.grammars = Grammars(tokenizer, model.vocab, model.eos_token_ids)
        self._ids = itertools.count()
        self._latest_rules: tuple[SamplingParams, _Rules] | None = None

    def new_request_id(self, name: str) -> str:
        """Return a unique id that contains `name`.

        It starts with a counter, so ids differ for all names.
        """
        return f"{next(self._ids)}-{name}"

    def reseed(self, seed: str) -> None:
        """Seed the generator of seeds for requests without a seed."""
        self._random.seed(seed)

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        client: str = "",
        check_length: Callable[[int], None] | None = None,
    ) -> PreparedRequest:
        """Check a prompt and its settings; raises InvalidRequestError.

        `check_length` is called with the number of prompt tokens, and may raise.
        """
        text, token_ids = self.read_prompt(
            prompt,
            add_special_tokens=params.add_special_tokens,
            kept=self.limits.truncation(params),
        )
        max_new_tokens = self.limits.max_new_tokens(len(token_ids), params)
        rules = self._rules(params)
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        self._check_queue_fields(priority, cache_salt, client)
        if check_length is not None:
            check_length(len(token_ids))
        grammar = (
            None
            if params.structured_outputs is None
            else self.grammars.for_request(params.structured_outputs, client)
        )
        requests = self._sequences(
            request_id,
            tuple(token_ids),
            params,
            rules,
            grammar,
            max_new_tokens=max_new_tokens,
            seed=seed,
            priority=priority,
            cache_salt=cache_salt,
            client=client,
        )
        sequence_ids = [request.request_id for request in requests]
        output_processor = OutputProcessor(
            request_id, text, token_ids, params, self.tokenizer, sequence_ids
        )
        return PreparedRequest(requests, output_processor, grammar)

    def _sequences(
        self,
        request_id: str,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        rules: _Rules,
        grammar: RequestGrammar | None,
        *,
        max_new_tokens: int,
        seed: int,
        priority: int,
        cache_salt: str,
        client: str,
    ) -> tuple[Request, ...]:
        """Return a request for each sequence of a prompt."""
        ends_text = frozenset(self.model.eos_token_ids)
        eos, ignored_eos = (
            (frozenset(), ends_text) if params.ignore_eos else (ends_text, frozenset())
        )
        # best_of ranks by log-probabilities; the output does not contain these.
        needs_scores = params.ranks_choices and params.logprobs is None
        sampling = replace(params, logprobs=0) if needs_scores else params
        is_single = params.num_sequences == 1
        return tuple(
            Request(
                request_id=request_id if is_single else f"{request_id}-{choice}",
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                seed=seed,
                choice_index=choice,
                stop_token_ids=eos | frozenset(params.stop_token_ids or ()),
                eos_token_ids=eos,
                ignored_eos_token_ids=ignored_eos,
                bad_words=rules[0],
                shared_rules=rules[1],
                grammar=None if grammar is None else grammar.start(),
                priority=priority,
                cache_salt=cache_salt,
                client=client,
                parent_id="" if is_single or max_new_tokens == 0 else request_id,
            )
            for choice in range(params.num_sequences)
        )

    def embed(
        self,
        request_id: str,
        prompt: Prompt,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
        client: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: TruncationSide = "right",
    ) -> PreparedRequest:
        """Check a prompt to embed, which may fill the context; raises InvalidRequestError.

        The last three arguments are those of SamplingParams, except that truncation keeps the first
        tokens by default, as in vLLM.
        """
        if pooling not in get_args(Pooling) or not isinstance(normalize, bool):
            raise InvalidRequestError(
                f"pooling is {describe_value(pooling)} but must be 'last' or 'mean', and "
                "normalize true or false",
                param="pooling",
            )
        self._check_queue_fields(priority, cache_salt, client)
        params = SamplingParams(
            max_tokens=0,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
            truncation_side=truncation_side,
        )
        text, token_ids = self.read_prompt(
            prompt, add_special_tokens=add_special_tokens, kept=self.limits.truncation(params)
        )
        self.limits.check_prompt_length(len(token_ids))
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling=params,
            max_new_tokens=self.limits.max_new_tokens(len(token_ids), params),
            seed=0,
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
            client=client,
        )
        pooler = Pooler(normalize=normalize)
        output_processor = OutputProcessor(
            request_id, text, token_ids, params, self.tokenizer, [request_id], pooler
        )
        return PreparedRequest((request,), output_processor)

    def read_prompt(
        self, prompt: Prompt, *, add_special_tokens: bool = True, kept: slice | None = None
    ) -> tuple[str | None, list[int]]:
        """Return a prompt's text (None for a prompt of token ids) and its token ids.

        Args:
            prompt: text or token ids, in any form of `Prompt`.
            add_special_tokens: add the tokens that the tokenizer puts around every text.
            kept: slice of the tokens to keep, for truncation; None for all of them.

        Raises:
            InvalidRequestError: the prompt is invalid.
        """
        text, whole = self._read_whole(prompt, add_special_tokens, is_truncated=kept is not None)
        token_ids = whole if kept is None else whole[kept]
        if text is None or len(token_ids) == len(whole):
            return text, token_ids
        return self.tokenizer.decode(token_ids), token_ids

    def _read_whole(
        self, prompt: Prompt, add_special_tokens: bool, *, is_truncated: bool
    ) -> tuple[str | None, list[int]]:
        content: object = prompt
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                names = ", ".join(describe_value(name) for name in list(prompt)[:5]) or "neither"
                raise InvalidRequestError(
                    f"a prompt has either 'prompt' or 'prompt_token_ids', not {names}",
                    param="prompt",
                )
            [(name, content)] = prompt.items()
            if isinstance(content, str) is not (name == "prompt"):
                expected = "text" if name == "prompt" else "a list of token ids"
                raise InvalidRequestError(
                    f"'{name}' is {describe_value(content)} but must be {expected}", param="prompt"
                )
        if isinstance(content, str):
            return content, self._encode(content, add_special_tokens, is_truncated=is_truncated)
        content = to_list(content)
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray | memoryview):
            raise InvalidRequestError(
                f"the prompt is {describe_value(content)} but must be text or a list of token ids",
                param="prompt",
            )
        if not content:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt"
            )
        # Refuse millions of token ids without checking each of them.
        if not is_truncated and len(content) > _MAX_CHECKED_CONTEXTS * self.limits.max_model_len:
            self.limits.check_prompt_length(len(content))
        token_ids = to_python_ids(content)
        wrong = [item for item in token_ids if not isinstance(item, int) or isinstance(item, bool)]
        if wrong:
            is_list = isinstance(wrong[0], str | Mapping | Sequence)
            remedy = "; give one prompt, not a list of prompts" if is_list else ""
            raise InvalidRequestError(
                f"the prompt has {describe_value(wrong[0])} among its token ids, which must be "
                f"integers{remedy}",
                param="prompt",
            )
        self._check_ids("prompt", token_ids)
        return None, token_ids

    def _encode(self, text: str, add_special_tokens: bool, *, is_truncated: bool) -> list[int]:
        self.check_text(text, is_truncated=is_truncated)
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequestError(
                "the prompt has no tokens once encoded; give other text", param="prompt"
            )
        self._check_ids("prompt", token_ids)
        return token_ids

    def check_text(self, text: str, *, is_truncated: bool = False) -> None:
        """Check a text before it is encoded; raises InvalidRequestError."""
        if not text:
            raise InvalidRequestError(
                "the prompt is empty; give at least one character", param="prompt"
            )
        check_unicode("prompt", text)
        num_bytes = len(text.encode())
        limit = self._max_truncated_bytes
        if num_bytes > limit and (is_truncated or self._max_token_bytes is None):
            kind = "one that is to be truncated" if is_truncated else "this model's tokenizer"
            raise InvalidRequestError(
                f"the prompt has {num_bytes} bytes, the limit for {kind} is {limit}; "
                "send the part to be read",
                param="prompt",
            )
        at_least = num_bytes // self._max_token_bytes if self._max_token_bytes else 1
        if at_least > self.limits.max_model_len and not is_truncated:
            raise ContextLengthError(
                f"the prompt has at least {at_least} tokens, the limit is "
                f"{self.limits.max_model_len}; shorten it",
                param="prompt",
            )

    def _check_queue_fields(self, priority: int, cache_salt: str, client: str) -> None:
        self.limits.check_priority(priority)
        for name, value in (("cache_salt", cache_salt), ("client", client)):
            if not isinstance(value, str):
                raise InvalidRequestError(
                    f"{name} is {describe_value(value)} but must be text", param=name
                )

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        outside = [i for i in token_ids if not 0 <= i < self.model.vocab]
        if outside:
            raise InvalidRequestError(
                f"{name} has token ids outside the vocabulary of 0 to {self.model.vocab - 1}: "
                f"{listed(str(i)[:24] for i in outside)}",
                param=name,
            )

    def _rules(self, params: SamplingParams) -> _Rules:
        """Check settings once for all prompts that share them; raises InvalidRequestError."""
        latest = self._latest_rules
        if latest is None or latest[0] is not params:
            self.limits.check_logprobs(params)
            for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
                self._check_ids(name, getattr(params, name) or ())
            bad_words = self._bad_words(params)
            latest = (params, (bad_words, TokenRules(params, bad_words)))
            self._latest_rules = latest  # a race with another thread only costs time
        return latest[1]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of each bad word, with and without a leading space.

        BPE encodes the two differently. Encodings with token ids outside the model are dropped.
        """
        spellings = [
            spelling for word in params.bad_words or () for spelling in (word, " " + word.lstrip())
        ]
        try:
            encoded = [
                tuple(self.tokenizer.encode(spelling, add_special_tokens=False))
                for spelling in spellings
            ]
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param="bad_words") from None
        return tuple(dict.fromkeys(ids for ids in encoded if ids and max(ids) < self.model.vocab))
