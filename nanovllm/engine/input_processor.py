"""What may enter the engine: prompts and settings are checked here, once, against the model and the cache.

Everything that is wrong with a request is found before it is queued, and the error names the value, the limit and the remedy. What
passes can always run to its end.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

from nanovllm.engine.grammar.grammar import CompiledGrammar, Grammars
from nanovllm.engine.logprobs import ENTRY_BYTES, POSITION_BYTES
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.pooling import Pooler
from nanovllm.engine.scheduling.request import Pooling, Request
from nanovllm.engine.scheduling.token_rules import TokenRules
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.model.config import GPT2Config
from nanovllm.prompts import Prompt, to_list, to_python_ids
from nanovllm.sampling_params import SamplingParams, TruncationSide, check_unicode

MAX_TRUNCATED_BYTES = (
    1 << 18
)  # of text, all of which must be tokenised to find its last tokens: that takes two hundred times the memory

_FAR_TOO_LONG = 16  # times the context


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A checked request: its sequences for the engine, and the output_processor that turns their updates into an answer.

    `grammar` is what they follow, which may still be compiling: who wants to know of errors in it before they run waits for it.
    """

    requests: tuple[Request, ...]
    output_processor: OutputProcessor
    grammar: CompiledGrammar | None = None

    @property
    def num_answers(self) -> int:
        """Answers asked for, which a bounded queue counts: more than sequences where equal ones are computed once."""
        return self.requests[0].sampling.num_candidates

    @property
    def num_tokens(self) -> int:
        """Tokens that it may come to, which a bounded queue counts: the prompt, which is computed once, and all of its answers."""
        first = self.requests[0]
        return first.num_prompt_tokens + self.num_answers * first.max_new_tokens

    @property
    def logprobs_bytes(self) -> int:
        """Memory that its log-probabilities may come to, which a server has so much of."""
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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must fit.

    Attributes:
        max_model_len: tokens of prompt and answer together.
        cache_tokens: tokens in the cache.
        max_logprobs: log-probabilities a position.
        has_priorities: whether a request may have a priority other than 0.
    """

    max_model_len: int
    cache_tokens: int
    max_logprobs: int
    has_priorities: bool = False


@contextmanager
def naming_prompt(index: int, count: int) -> Iterator[None]:
    """Of several prompts, an error names the one at fault."""
    try:
        yield
    except InvalidRequestError as error:
        if count == 1:
            raise
        raise type(error)(f"prompt {index}: {error}", param=error.param) from error.__cause__


class InputProcessor:
    """Checks requests and gives them their seeds. May be used from any thread."""

    def __init__(
        self, model: GPT2Config, tokenizer: Tokenizer, limits: Limits, *, seed: int | None = None
    ) -> None:
        """`seed` makes the seeds that are drawn for requests without one repeatable."""
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self._random = random.Random(seed)  # noqa: S311 - seeds for sampling, no secrets
        self._longest_token = tokenizer.longest_token
        self.grammars = Grammars(tokenizer, model.vocab, model.eos_token_ids)
        self._ids = itertools.count()
        self._latest_rules: tuple[SamplingParams, tuple[tuple[int, ...], ...], TokenRules] | None
        self._latest_rules = None

    def new_request_id(self, name: str) -> str:
        """An id that no other request of the engine has, with `name` in it. Nothing else makes ids.

        The number stands in front, so that no `name` can make two ids equal, nor two ids of sequences.
        """
        return f"{next(self._ids)}-{name}"

    def reseed(self, seed: str) -> None:
        """Make the seeds that are drawn from now on follow from this text."""
        self._random.seed(seed)

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        check_length: Callable[[int], None] | None = None,
    ) -> PreparedRequest:
        """Check a prompt and its settings; raises InvalidRequestError.

        `check_length` is called with the number of prompt tokens, and may refuse the request. It
        runs before the request's grammar takes a place among those that are compiled.
        """
        text, token_ids = self.read_prompt(
            prompt,
            add_special_tokens=params.add_special_tokens,
            kept=self._kept_tokens(params),
        )
        max_new_tokens = self._room(len(token_ids), params)
        bad_words, rules = self._rules(params)
        ends_text = frozenset(self.model.eos_token_ids)
        eos, ignored_eos = (
            (frozenset(), ends_text) if params.ignore_eos else (ends_text, frozenset())
        )
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        self._check_place(priority, cache_salt)
        if check_length is not None:
            check_length(len(token_ids))
        grammar = (
            None
            if params.structured_outputs is None
            else self.grammars.begin(params.structured_outputs)
        )
        needs_scores = params.ranks_answers and params.logprobs is None
        sampling = (
            replace(params, logprobs=0) if needs_scores else params
        )  # the output_processor does not show them
        requests = tuple(
            Request(
                request_id=request_id if params.num_sequences == 1 else f"{request_id}-{choice}",
                prompt_token_ids=tuple(token_ids),
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                seed=seed,
                choice_index=choice,
                stop_token_ids=eos | frozenset(params.stop_token_ids or ()),
                eos_token_ids=eos,
                ignored_eos_token_ids=ignored_eos,
                bad_words=bad_words,
                shared_rules=rules,
                grammar=None if grammar is None else grammar.start(),
                priority=priority,
                cache_salt=cache_salt,
                parent_id=request_id if params.num_sequences > 1 and max_new_tokens > 0 else "",
            )
            for choice in range(params.num_sequences)
        )
        output_processor = OutputProcessor(
            request_id,
            text,
            token_ids,
            params,
            self.tokenizer,
            [request.request_id for request in requests],
        )
        return PreparedRequest(requests, output_processor, grammar)

    def embed(
        self,
        request_id: str,
        prompt: Prompt,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int | None = None,
        truncation_side: TruncationSide = "right",
    ) -> PreparedRequest:
        """Check a prompt that is to become a vector, which generates nothing and may fill the context; raises InvalidRequestError.

        The last three arguments are those of SamplingParams, except that a text which is embedded
        keeps its first tokens by default, as in vLLM.
        """
        if pooling not in get_args(Pooling) or not isinstance(normalize, bool):
            raise InvalidRequestError(
                f"pooling is {_shown(pooling)} but must be 'last' or 'mean', and normalize true or false",
                param="pooling",
            )
        self._check_place(priority, cache_salt)
        params = SamplingParams(
            max_tokens=0,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
            truncation_side=truncation_side,
        )
        text, token_ids = self.read_prompt(
            prompt, add_special_tokens=add_special_tokens, kept=self._kept_tokens(params)
        )
        limit = self.limits.max_model_len
        if len(token_ids) > limit:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens, the limit is {limit}; shorten it",
                param="prompt",
            )
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling=params,
            max_new_tokens=self._room(len(token_ids), params),
            seed=0,
            pooling=pooling,
            priority=priority,
            cache_salt=cache_salt,
        )
        output_processor = OutputProcessor(
            request_id,
            text,
            token_ids,
            params,
            self.tokenizer,
            [request_id],
            Pooler(normalize=normalize),
        )
        return PreparedRequest((request,), output_processor)

    def read_prompt(
        self, prompt: Prompt, *, add_special_tokens: bool = True, kept: slice | None = None
    ) -> tuple[str | None, list[int]]:
        """A prompt's text, None where it came as ids, and its token ids; raises InvalidRequestError.

        Args:
            add_special_tokens: with those that the tokenizer puts around every text.
            kept: the part of the tokens that is read, and only its text; None for all of them.
        """
        text, whole = self._read_whole(prompt, add_special_tokens, is_truncated=kept is not None)
        token_ids = whole if kept is None else whole[kept]
        if text is None or len(token_ids) == len(whole):
            return text, token_ids
        return self.tokenizer.decode(token_ids), token_ids

    def _read_whole(
        self, prompt: Prompt, add_special_tokens: bool, *, is_truncated: bool
    ) -> tuple[str | None, list[int]]:
        given: object = prompt
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                names = ", ".join(_shown(name) for name in list(prompt)[:5]) or "neither"
                raise InvalidRequestError(
                    f"a prompt has either 'prompt' or 'prompt_token_ids', not {names}",
                    param="prompt",
                )
            [(name, given)] = prompt.items()
            if isinstance(given, str) is not (name == "prompt"):
                wanted = "text" if name == "prompt" else "a list of token ids"
                raise InvalidRequestError(
                    f"'{name}' is {_shown(given)} but must be {wanted}", param="prompt"
                )
        if isinstance(given, str):
            return given, self._encode(given, add_special_tokens, is_truncated=is_truncated)
        given = to_list(given)
        if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray | memoryview):
            raise InvalidRequestError(
                f"the prompt is {_shown(given)} but must be text or a list of token ids",
                param="prompt",
            )
        if not given:
            raise InvalidRequestError(
                "the prompt is empty; give at least one token", param="prompt"
            )
        limit = self.limits.max_model_len
        if not is_truncated and len(given) > _FAR_TOO_LONG * limit:  # do not look at millions
            raise ContextLengthError(
                f"the prompt has {len(given)} tokens, the limit is {limit}; shorten it",
                param="prompt",
            )
        token_ids = to_python_ids(given)
        wrong = [item for item in token_ids if not isinstance(item, int) or isinstance(item, bool)]
        if wrong:
            is_list = isinstance(wrong[0], str | Mapping | Sequence)
            remedy = "; give one prompt, not a list of prompts" if is_list else ""
            raise InvalidRequestError(
                f"the prompt has {_shown(wrong[0])} among its token ids, which must be whole "
                f"numbers{remedy}",
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
        """Refuse a prompt that cannot be right before it is encoded; raises InvalidRequestError."""
        if not text:
            raise InvalidRequestError(
                "the prompt is empty; give at least one character", param="prompt"
            )
        check_unicode("prompt", text)
        num_bytes = len(text.encode())
        if num_bytes > MAX_TRUNCATED_BYTES and (is_truncated or self._longest_token is None):
            kind = "one that is to be truncated" if is_truncated else "this model's tokenizer"
            raise InvalidRequestError(
                f"the prompt has {num_bytes} bytes, the limit for {kind} is {MAX_TRUNCATED_BYTES}; send the part to be read",
                param="prompt",
            )
        at_least = num_bytes // self._longest_token if self._longest_token else 1
        if (
            at_least > self.limits.max_model_len and not is_truncated
        ):  # too long however it is split: refuse it before spending time on it
            raise ContextLengthError(
                f"the prompt has at least {at_least} tokens, the limit is {self.limits.max_model_len}; shorten it",
                param="prompt",
            )

    def _kept_tokens(self, params: SamplingParams) -> slice | None:
        """Return the part of a prompt's tokens that is to be read; None for all of them."""
        count = params.truncate_prompt_tokens
        if count is None:
            return None
        limit = self.limits.max_model_len
        if count > limit:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {count}, the limit is {limit} (the context); lower it, "
                "or send -1 for as many tokens as fit",
                param="truncate_prompt_tokens",
            )
        if count == -1:
            count = self._fitting_tokens(params)
        return slice(-count, None) if params.truncation_side == "left" else slice(count)

    def _fitting_tokens(self, params: SamplingParams) -> int:
        """Return how many tokens of a prompt the context and the KV cache have room for."""
        answer = 1 if params.max_tokens is None else params.max_tokens
        fitting = min(
            self.limits.max_model_len - answer, self.limits.cache_tokens - max(answer - 1, 0)
        )
        if fitting < 1:
            raise ContextLengthError(
                f"max_tokens is {answer}, which leaves no room for a prompt in a context of {self.limits.max_model_len} tokens and a KV cache of "
                f"{self.limits.cache_tokens}; lower it",
                param="max_tokens",
            )
        return fitting

    def _room(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Tokens that may be generated: what was asked for, within the context; an error where that can never be computed."""
        limit = self.limits.max_model_len
        if prompt_tokens > limit or (prompt_tokens == limit and params.max_tokens != 0):
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens, which leaves no room for an answer in a context of {limit}; shorten it",
                param="prompt",
            )
        room = limit - prompt_tokens
        in_cache = max(
            self.limits.cache_tokens - prompt_tokens + 1, 1
        )  # what is left of the cache limits an answer that may be any length
        max_new_tokens = (
            min(room, in_cache) if params.max_tokens is None else min(params.max_tokens, room)
        )
        needed = prompt_tokens + max(
            max_new_tokens - 1, 0
        )  # the last token's keys and values are never used
        if needed > self.limits.cache_tokens:
            raise ContextLengthError(
                f"a prompt of {prompt_tokens} tokens and an answer of up to {max_new_tokens} need {needed} tokens of KV cache, which has "
                f"{self.limits.cache_tokens}; ask for less, or serve with a larger kv_cache_memory",
                param="max_tokens",
            )
        return max_new_tokens

    def _check_place(self, priority: int, cache_salt: str) -> None:
        """What decides on a request's place in the queue and in the cache."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(
                f"priority is {_shown(priority)} but must be a whole number", param="priority"
            )
        if priority != 0 and not self.limits.has_priorities:
            raise InvalidRequestError(
                f"priority is {priority}, but requests are served in the order of their arrival; leave it out, or start "
                "with --scheduling-policy priority (scheduling_policy='priority')",
                param="priority",
            )
        if not isinstance(cache_salt, str):
            raise InvalidRequestError(
                f"cache_salt is {_shown(cache_salt)} but must be text", param="cache_salt"
            )

    def _check_settings(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and asked > self.limits.max_logprobs:
                raise InvalidRequestError(
                    f"{name} is {asked}, the limit is {self.limits.max_logprobs} (max_logprobs)",
                    param=name,
                )
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids or ())

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        outside = [i for i in token_ids if not 0 <= i < self.model.vocab]
        if outside:
            shown = ", ".join(str(i)[:24] for i in outside[:5]) + (
                ", ..." if len(outside) > 5 else ""
            )
            raise InvalidRequestError(
                f"{name} has token ids outside the vocabulary of 0 to {self.model.vocab - 1}: {shown}",
                param=name,
            )

    def _rules(self, params: SamplingParams) -> tuple[tuple[tuple[int, ...], ...], TokenRules]:
        """Check settings and lay them out, once for the many prompts of a request that share them; raises InvalidRequestError."""
        latest = self._latest_rules
        if latest is None or latest[0] is not params:
            self._check_settings(params)
            bad_words = self._bad_words(params)
            latest = (params, bad_words, TokenRules(params, bad_words))
            self._latest_rules = latest  # another thread may do the same, which only costs time
        return latest[1], latest[2]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word as tokens, at the beginning of a text and after a space, where BPE spells it otherwise.

        A spelling that has tokens which the model does not know cannot come up, and is left out.
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


def _shown(value: object) -> str:
    """A wrong value for a message: as it is where that is short, otherwise its type."""
    text = repr(value) if isinstance(value, str | int | float | None) else ""
    return text if 0 < len(text) <= 40 else f"a {type(value).__name__}"
