"""POST /v1/completions: its parser and its renderer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanovllm.checked_fields import checked_fields
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import BeamSearchParams, GenerationRequest
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError, listed
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.http.validation_errors import quote
from nanovllm.server.openai import response_types as types
from nanovllm.server.openai.beams import beam_search_params, check_beam_fields
from nanovllm.server.openai.endpoint import Endpoint, sampling_params
from nanovllm.server.openai.logprobs import ShownPosition, finite, prompt_logprobs, push_all, top
from nanovllm.server.openai.renderer import ChoicesRenderer, ResponseContext
from nanovllm.server.openai.schemas import DEFAULT_MAX_TOKENS, CompletionRequest, SamplingBody
from nanovllm.server.openai.structured import structured_outputs

MAX_TRUNCATED_CHARACTERS = 1 << 20


def parse_completion(
    body: CompletionRequest, engine: Engine, _: ChatTemplate | None
) -> GenerationRequest:
    """Return the request of a body; raises InvalidRequestError."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.use_beam_search:
        check_beam_fields(body)
        return generation_request(body, body.logged_prompts, beam_search_params(body, max_tokens))
    counts = [body.prompt_logprobs, body.logprobs if body.echo else None]
    fields = sampling_fields(body) | {
        "logprobs": body.logprobs,
        "prompt_logprobs": max((count for count in counts if count is not None), default=None),
        "max_tokens": max_tokens,
    }
    params = sampling_params(engine, **fields)
    if params.truncate_prompt_tokens is not None:
        check_truncated("prompt", body.logged_prompts)
    return generation_request(body, body.logged_prompts, params)


def generation_request(
    body: SamplingBody, prompts: Sequence[Prompt], params: SamplingParams | BeamSearchParams
) -> GenerationRequest:
    """Return the request of a completion or a chat."""
    return GenerationRequest(
        prompts=prompts,
        params=params,
        n=body.n or 1,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        must_fit=True,
    )


def sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """Return the values of the settings that completions and chats share.

    Raises InvalidRequestError.
    """
    return {
        **{name: getattr(body, name) for name in checked_fields(SamplingParams)},
        "logit_bias": _logit_bias(body.logit_bias),
        "structured_outputs": structured_outputs(body.response_format, body.structured_outputs),
    }


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    """Return the bias with its keys, which are text in JSON, as token ids."""
    if bias is None:
        return None
    wrong = [key for key in bias if not key.isascii() or not key.isdigit() or len(key) > 12]
    if wrong:
        raise InvalidRequestError(
            "logit_bias has keys that are not token ids: "
            + listed(quote(key[:40]) for key in wrong),
            param="logit_bias",
        )
    return {int(key): value for key, value in bias.items()}


def check_truncated(field: str, prompts: Sequence[str | list[int]]) -> None:
    """Raise InvalidRequestError for long texts with truncate_prompt_tokens.

    All of a text is tokenized to find the tokens that are read.
    """
    total = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if total > MAX_TRUNCATED_CHARACTERS:
        raise InvalidRequestError(
            f"the texts of {field} have {total} characters in all, the limit for "
            f"truncate_prompt_tokens is {MAX_TRUNCATED_CHARACTERS}; send the parts to be read, "
            "or fewer at once",
            param=field,
        )


class CompletionRenderer(ChoicesRenderer[CompletionRequest]):
    """Renders completions: choices prompt by prompt, each prompt's n choices in order."""

    body_type = "text_completion"
    chunk_type = "text_completion"

    def __init__(self, context: ResponseContext, request: CompletionRequest) -> None:
        super().__init__(context, request)
        self._formatters: dict[int, ChoiceFormatter] = {}

    def choices(self, outputs: Sequence[RequestOutput]) -> Iterator[types.CompletionChoice]:
        """Yield the choices of a whole response."""
        for index, output in enumerate(outputs):
            for choice in output.outputs:
                choice_index = self._choice_index(index, choice)
                yield ChoiceFormatter(self, output).choice(choice_index, choice, output)

    def pieces(
        self, index: int, delta: CompletionOutput, output: RequestOutput
    ) -> list[types.CompletionChoice]:
        """Return what is new of a choice of the prompt at `index`; nothing if that is empty."""
        choice_index = self._choice_index(index, delta)
        if choice_index not in self._formatters:
            self._formatters[choice_index] = ChoiceFormatter(self, output)
        choice = self._formatters[choice_index].choice(choice_index, delta, output)
        return [choice] if any(value for name, value in choice.items() if name != "index") else []

    def _choice_index(self, prompt_index: int, choice: CompletionOutput) -> int:
        return prompt_index * (self.request.n or 1) + choice.index


class ChoiceFormatter:
    """Renders one choice, whole or piece by piece."""

    def __init__(self, renderer: CompletionRenderer, output: RequestOutput) -> None:
        self._request = request = renderer.request
        self._token_texts, self._drafted_tokens = renderer.token_texts, renderer.drafted_tokens
        self._prompt = _prompt_text(output, renderer.context.tokenizer) if request.echo else ""
        self._texts = self._token_texts(
            skip_special_tokens=request.skip_special_tokens,
            prompt_token_ids=output.prompt_token_ids,
        )
        self._offset = len(self._prompt)
        self._has_begun = False

    def choice(
        self, index: int, delta: CompletionOutput, output: RequestOutput
    ) -> types.CompletionChoice:
        """Return the choice's next piece; with `echo` the first one begins with the prompt."""
        is_first, self._has_begun = not self._has_begun, True
        has_prompt = is_first and bool(self._request.echo)
        logprobs: types.CompletionLogprobs | None = None
        if delta.logprobs is not None:
            logprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
            if has_prompt and output.prompt_logprobs is not None:
                # A prompt that came as text has none of the special tokens around it.
                texts = self._token_texts(skip_special_tokens=output.prompt is not None)
                prompt = push_all(
                    texts, output.prompt_token_ids, output.prompt_logprobs, is_end=True
                )
                self._add_logprobs(logprobs, prompt, 0)
            is_end = delta.finish_reason is not None
            tokens = push_all(self._texts, delta.token_ids, delta.logprobs, is_end=is_end)
            self._offset = self._add_logprobs(logprobs, tokens, self._offset)
        choice: types.CompletionChoice = {
            "index": index, "text": (self._prompt if has_prompt else "") + delta.text,
            "logprobs": logprobs, "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason, "prompt_logprobs": None, "prompt_token_ids": None,
            "token_ids": None, **self._drafted_tokens(delta),
        }  # fmt: skip
        if self._request.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _add_logprobs(
        self, logprobs: types.CompletionLogprobs, positions: Iterable[ShownPosition], offset: int
    ) -> int:
        """Append parallel entries; return the offset after the last one.

        The offset of a token is where the text that it adds begins, in characters.
        """
        count = self._request.logprobs or 0
        for shown in positions:
            token_id, position = shown.token_id, shown.logprobs
            logprobs["text_offset"].append(offset)
            offset += shown.num_added
            logprobs["tokens"].append(shown.texts[token_id])
            logprobs["token_logprobs"].append(
                None if position is None else finite(position[token_id].logprob)
            )
            logprobs["top_logprobs"].append(
                None if position is None else _by_text(position, token_id, count, shown.texts)
            )
        return offset


def _prompt_text(output: RequestOutput, tokenizer: Tokenizer) -> str:
    """Return the prompt as it was sent; decoded if it was sent as token ids."""
    if output.prompt is not None:
        return output.prompt
    return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _by_text(
    position: PositionLogprobs, token_id: int, count: int, texts: Mapping[int, str]
) -> dict[str, float]:
    """Return the top `count` tokens and the token itself, by text.

    Of tokens with the same text, such as those that add none, the most likely one counts.
    """
    logprobs: dict[str, float] = {}
    for other, entry in top(position, count):
        logprobs.setdefault(texts[other], finite(entry.logprob))
    logprobs.setdefault(texts[token_id], finite(position[token_id].logprob))
    return logprobs


COMPLETIONS = Endpoint(
    path="/v1/completions",
    name="completions",
    description="Complete one or several prompts.",
    id_prefix="cmpl-",
    body=CompletionRequest,
    parse=parse_completion,
    renderer=CompletionRenderer,
    response=types.Completion,
    event=types.CompletionChunk,
)
