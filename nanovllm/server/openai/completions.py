"""POST /v1/completions: from the request's body to checked prepared_requests, and from finished outputs to the answer."""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import PreparedRequest, naming_prompt
from nanovllm.errors import ContextLengthError, InvalidRequestError, NanovllmError
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.http.problems import quote
from nanovllm.server.openai.logprobs import (
    ShownPosition,
    TokenTexts,
    finite,
    likeliest,
    prompt_logprobs,
    push_all,
)
from nanovllm.server.openai.response_types import (
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from nanovllm.server.openai.schemas import DEFAULT_MAX_TOKENS, CompletionRequest, SamplingBody
from nanovllm.server.openai.structured import in_sent_fields, structured_outputs

MAX_TRUNCATED_CHARACTERS = 1 << 20
_PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "best_of", "seed",
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "bad_words", "allowed_token_ids", "skip_special_tokens",
    "prompt_logprobs", "truncate_prompt_tokens", "truncation_side",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A checked request: its prompts' prepared_requests and what the answer needs to know of the request."""

    id: str
    created: int
    model: str
    body: CompletionRequest
    prepared_requests: tuple[PreparedRequest, ...]
    decode_prompt: "PromptDecoder"

    @property
    def n(self) -> int:
        """Answers a prompt."""
        return self.body.n or 1


class PromptDecoder:
    """Texts of prompts, for `echo`: as sent, or decoded where token ids were sent or the text was truncated."""

    def __init__(self, engine: Engine) -> None:
        """Decode with the engine's tokenizer."""
        self.tokenizer = engine.tokenizer

    def __call__(self, output: RequestOutput) -> str:
        """The prompt's text."""
        return (
            output.prompt
            if output.prompt is not None
            else self.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        )


def sampling_params(
    body: SamplingBody, engine: Engine, *, max_tokens: int | None, **others: Any
) -> SamplingParams:
    """Return the settings of a completion or a chat; raises InvalidRequestError.

    Those that the body leaves out are those of the model's own generation_config.json. `others` are
    the settings that the two ask for in different ways; None is left out.
    """
    settings: dict[str, Any] = {**engine.sampling_defaults}
    found = {name: getattr(body, name) for name in _PASSED_ON} | others
    settings.update({name: value for name, value in found.items() if value is not None})
    settings["max_tokens"] = max_tokens
    settings["logit_bias"] = _bias(body.logit_bias)
    settings["structured_outputs"] = structured_outputs(
        body.response_format, body.structured_outputs
    )
    return SamplingParams(**settings)


def _completion_params(body: CompletionRequest, engine: Engine) -> SamplingParams:
    counts = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return sampling_params(
        body,
        engine,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max((count for count in counts if count is not None), default=None),
        add_special_tokens=body.add_special_tokens,
    )


def _bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are text; these must be whole numbers."""
    if bias is None:
        return None
    wrong = [key for key in bias if not key.isascii() or not key.isdigit() or len(key) > 12]
    if wrong:
        raise InvalidRequestError(
            f"logit_bias has the key {quote(wrong[0][:40])} but its keys must be token ids",
            param="logit_bias",
        )
    return {int(key): value for key, value in bias.items()}


def check_context(
    prompt_tokens: int,
    params: SamplingParams,
    max_model_len: int,
    max_tokens_field: str = "max_tokens",
) -> None:
    """Over HTTP an answer is never cut short silently: prompt and max_tokens must fit the context.

    `max_tokens_field` is the field by which the client sent max_tokens.
    """
    asked = params.max_tokens or 0
    if prompt_tokens + asked > max_model_len:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and {max_tokens_field} is {asked}, together {prompt_tokens + asked}, "
            f"more than the context of {max_model_len}; shorten the prompt or lower {max_tokens_field}",
            param=max_tokens_field,
        )


def check_truncated(field: str, prompts: Sequence[str | list[int]]) -> None:
    """Raise InvalidRequestError where texts that are to be truncated are long: all of a text is tokenized to find the tokens that are read."""
    total = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if total > MAX_TRUNCATED_CHARACTERS:
        raise InvalidRequestError(
            f"the texts of {field} have {total} characters in all, the limit for truncate_prompt_tokens is {MAX_TRUNCATED_CHARACTERS}; "
            "send the parts to be read, or fewer at once",
            param=field,
        )


def make_job(body: CompletionRequest, engine: Engine, model: str) -> CompletionCall:
    """Check a body against the model; raises InvalidRequestError before anything is queued."""
    refuse_beams(body)
    job_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
    try:
        params = _completion_params(body, engine)
        if params.truncate_prompt_tokens is not None:
            check_truncated("prompt", body.prompts)
        prepared_requests = _prepare_all(body, engine, job_id, params)
    except InvalidRequestError as error:
        raise in_sent_fields(error, body.structured_outputs) from error
    return CompletionCall(
        job_id, int(time.time()), model, body, prepared_requests, PromptDecoder(engine)
    )


def refuse_beams(body: SamplingBody) -> None:
    """Raise InvalidRequestError for a beam search in a file of requests."""
    if body.use_beam_search:
        raise InvalidRequestError(
            "use_beam_search is for requests to a server, not for files of requests; leave it out",
            param="use_beam_search",
        )


def _prepare_all(
    body: CompletionRequest, engine: Engine, job_id: str, params: SamplingParams
) -> tuple[PreparedRequest, ...]:
    """Return one prepared for each prompt; raises InvalidRequestError that names the prompt."""
    prepared_requests: list[PreparedRequest] = []
    try:
        for index, prompt in enumerate(body.prompts):
            with naming_prompt(index, len(body.prompts)):
                prepared_requests.append(
                    engine.input_processor.submit(
                        engine.input_processor.new_request_id(job_id),
                        prompt,
                        params,
                        priority=body.priority,
                        cache_salt=body.cache_salt or "",
                        check_length=partial(
                            check_context, params=params, max_model_len=engine.max_model_len
                        ),
                    )
                )
    except NanovllmError:
        prepared_requests.clear()  # their grammars would compile for as long as the traceback is kept
        raise
    return tuple(prepared_requests)


def answer_head(answer_id: str, kind: str, created: int, model: str) -> dict[str, Any]:
    """Return the fields before the choices of a whole answer, whose type is `kind`."""
    return {
        "id": answer_id, "object": kind, "created": created, "model": model,
        "service_tier": None, "system_fingerprint": None,
    }  # fmt: skip


def completion_head(job: CompletionCall) -> dict[str, Any]:
    """Return the fields before the choices of the whole answer."""
    return answer_head(job.id, "text_completion", job.created, job.model)


def completion_body(job: CompletionCall, outputs: list[RequestOutput]) -> dict[str, Any]:
    """Return the whole answer: choices prompt by prompt, each prompt's n answers in order."""
    choices = list(completion_choices(job, outputs))
    return {**completion_head(job), "choices": choices, "usage": completion_usage(outputs)}


def completion_choices(
    job: CompletionCall, outputs: Sequence[RequestOutput]
) -> Iterator[CompletionChoice]:
    """The choices one by one: one may be a thousand times larger than what it is made of."""
    for place, output in enumerate(outputs):
        for answer in output.outputs:
            yield ChoiceFormatter(job, output).choice(place * job.n + answer.index, answer, output)


def completion_usage(outputs: Sequence[RequestOutput]) -> Usage:
    """The `usage` object of the whole answer."""
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(output.num_generated_tokens for output in outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Tokens counted: each prompt once, every answer that was asked for, also those that best_of left out and each of several equal ones."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


class ChoiceFormatter:
    """Turns one answer, whole or piece by piece, into choices; keeps what the pieces have in common."""

    def __init__(self, job: CompletionCall, output: RequestOutput) -> None:
        """Format one answer to `output`'s prompt."""
        self._job = job
        self._prompt = job.decode_prompt(output) if job.body.echo else ""
        self._texts = self._token_texts(skip_special_tokens=job.body.skip_special_tokens)
        self._offset = len(self._prompt)
        self._begun = False

    def choice(
        self, index: int, answer: CompletionOutput, output: RequestOutput
    ) -> CompletionChoice:
        """The answer's next piece; the first one has the prompt in front where `echo` asks for it."""
        first, self._begun = not self._begun, True
        echo = first and bool(self._job.body.echo)
        logprobs: CompletionLogprobs | None = None
        if answer.logprobs is not None:
            logprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
            if echo and output.prompt_logprobs is not None:
                is_text = (
                    output.prompt is not None
                )  # which has none of the special tokens that the tokenizer puts around it
                texts = self._token_texts(skip_special_tokens=is_text)
                prompt = push_all(
                    texts, output.prompt_token_ids, output.prompt_logprobs, is_end=True
                )
                self._add_logprobs(logprobs, prompt, 0)
            is_end = answer.finish_reason is not None
            tokens = push_all(self._texts, answer.token_ids, answer.logprobs, is_end=is_end)
            self._offset = self._add_logprobs(logprobs, tokens, self._offset)
        choice: CompletionChoice = {
            "index": index, "text": (self._prompt if echo else "") + answer.text, "logprobs": logprobs,
            "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
            "prompt_logprobs": None, "prompt_token_ids": None, "token_ids": None,
        }  # fmt: skip
        if self._job.body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._job.body.return_token_ids:
            choice["token_ids"] = answer.token_ids
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _token_texts(self, *, skip_special_tokens: bool) -> TokenTexts:
        return TokenTexts(
            self._job.decode_prompt.tokenizer,
            skip_special_tokens=skip_special_tokens,
            as_token_ids=bool(self._job.body.return_tokens_as_token_ids),
        )

    def _add_logprobs(
        self, logprobs: CompletionLogprobs, positions: Iterable[ShownPosition], offset: int
    ) -> int:
        """Append parallel entries; a token's offset is where the text begins that it adds to. Gives the offset of the next."""
        count = self._job.body.logprobs or 0
        for shown in positions:
            token_id, found = shown.token_id, shown.logprobs
            logprobs["text_offset"].append(offset)
            offset += shown.num_added
            logprobs["tokens"].append(shown.texts[token_id])
            logprobs["token_logprobs"].append(
                None if found is None else finite(found[token_id].logprob)
            )
            logprobs["top_logprobs"].append(
                None if found is None else _by_text(found, token_id, count, shown.texts)
            )
        return offset


def _by_text(
    position: PositionLogprobs, token_id: int, count: int, texts: Mapping[int, str]
) -> dict[str, float]:
    """The most likely `count` tokens and the token itself; of tokens that read alike, such as those that add no text, the likeliest stays."""
    found: dict[str, float] = {}
    for other, entry in likeliest(position, count):
        found.setdefault(texts[other], finite(entry.logprob))
    found.setdefault(texts[token_id], finite(position[token_id].logprob))
    return found
