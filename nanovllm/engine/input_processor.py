"""InputProcessor: checks requests, and makes the sequences that the engine runs.

Every error of a request is found before it is queued, except that of its grammar, and names the
value, the limit and the remedy. An accepted request can always run to its end.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

from nanovllm.engine.generation_request import (
    BeamSearchParams,
    GenerationRequest,
    PoolingParams,
)
from nanovllm.engine.grammar.grammar import Grammars
from nanovllm.engine.pooling import Pooler
from nanovllm.engine.prompt_reader import PromptReader
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.scheduling.request import Request
from nanovllm.engine.scheduling.token_rules import TokenRules
from nanovllm.engine.sequence_output import SequenceOutput
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError, describe_value
from nanovllm.model.config import ModelConfig
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

_Rules: TypeAlias = tuple[tuple[tuple[int, ...], ...], TokenRules]
"""Token ids of bad words, and the allowed, biased and banned tokens."""


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
        self, model: ModelConfig, tokenizer: Tokenizer, limits: Limits, *, seed: int | None = None
    ) -> None:
        """Create an input processor; `seed` seeds the seeds of requests that have none."""
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.reader = PromptReader(tokenizer, model.vocab, limits)
        self.grammars = Grammars(tokenizer, model.vocab, model.eos_token_ids)
        self._random = random.Random(seed)  # noqa: S311 - seeds for sampling, no secrets
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

    def process(self, request: GenerationRequest) -> tuple[PromptRequest, ...]:
        """Check and tokenize the prompts of a request that samples or embeds.

        A grammar is compiled once the engine has the request, which it ends if that fails.

        Raises InvalidRequestError for an invalid prompt or setting; the message has the index of
        the prompt if there are several.
        """
        params = request.params
        assert not isinstance(params, BeamSearchParams), "BeamSearches checks beam searches"
        self._check_queue_fields(request)
        sampling = params.prompt_params if isinstance(params, PoolingParams) else params
        prompts: list[PromptRequest] = []
        for index, prompt in enumerate(request.prompts):
            with naming_prompt(index, len(request.prompts)):
                prompts.append(self._process(prompt, request, sampling))
        return tuple(prompts)

    def _process(
        self, prompt: Prompt, request: GenerationRequest, params: SamplingParams
    ) -> PromptRequest:
        """Check and tokenize one prompt; `params` are the settings of its computation."""
        limits = self.limits
        pooling = request.params if isinstance(request.params, PoolingParams) else None
        text, token_ids = self.reader.read(
            prompt, add_special_tokens=params.add_special_tokens, kept=limits.truncation(params)
        )
        if pooling is not None:
            limits.check_prompt_length(len(token_ids))
        max_new_tokens = limits.max_new_tokens(
            len(token_ids), params, must_fit=request.must_fit and pooling is None
        )
        bad_words, rules = self._rules(params)
        seed = params.seed
        if seed is None:
            seed = self._random.getrandbits(64) if pooling is None else 0
        grammar = (
            None
            if params.structured_outputs is None
            else self.grammars.for_request(params.structured_outputs, request.client)
        )
        ends_text = frozenset(self.model.eos_token_ids)
        eos, ignored_eos = (
            (frozenset(), ends_text) if params.ignore_eos else (ends_text, frozenset())
        )
        # best_of ranks by log-probabilities; the output does not contain these.
        needs_scores = params.ranks_choices and params.logprobs is None
        is_single = params.num_sequences == 1
        request_id = self.new_request_id(request.request_id)
        requests = [
            Request(
                request_id=request_id if is_single else f"{request_id}-{choice}",
                prompt_token_ids=tuple(token_ids),
                sampling=replace(params, logprobs=0) if needs_scores else params,
                max_new_tokens=max_new_tokens,
                seed=seed,
                choice_index=choice,
                stop_token_ids=eos | frozenset(params.stop_token_ids or ()),
                eos_token_ids=eos,
                ignored_eos_token_ids=ignored_eos,
                bad_words=bad_words,
                shared_rules=rules,
                grammar=None if grammar is None else grammar.start(),
                priority=request.priority,
                cache_salt=request.cache_salt,
                client=request.client,
                parent_id="" if is_single or max_new_tokens == 0 else request_id,
                pooling=None if pooling is None else pooling.pooling,
            )
            for choice in range(params.num_sequences)
        ]
        pooler = None if pooling is None else Pooler(normalize=pooling.normalize)
        outputs = [self.begin_output(params, token_ids) for _ in requests]
        return PromptRequest(request_id, text, requests, params, outputs, self.tokenizer, pooler)

    def begin_output(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> SequenceOutput:
        """Return the output of a sequence without tokens, which continues a prompt."""
        return SequenceOutput.begin(params, self.tokenizer, prompt_token_ids)

    def _check_queue_fields(self, request: GenerationRequest) -> None:
        self.limits.check_priority(request.priority)
        for name in ("cache_salt", "client"):
            value = getattr(request, name)
            if not isinstance(value, str):
                raise InvalidRequestError(
                    f"{name} is {describe_value(value)} but must be text", param=name
                )

    def _rules(self, params: SamplingParams) -> _Rules:
        """Check settings once for all prompts that share them; raises InvalidRequestError."""
        latest = self._latest_rules
        if latest is None or latest[0] is not params:
            self.limits.check_logprobs(params)
            for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
                self.reader.check_ids(name, getattr(params, name) or ())
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
                tuple(self.tokenizer.encode_continuation(spelling)) for spelling in spellings
            ]
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param="bad_words") from None
        return tuple(dict.fromkeys(ids for ids in encoded if ids and max(ids) < self.model.vocab))
