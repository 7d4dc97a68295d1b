"""Renderers: outputs in the form of an endpoint, whole or as server-sent events.

Each endpoint has one. ChoicesRenderer has what completions and chats share: a list of choices, and
chunks with one choice each.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import CompletionOutput, EmbeddingRequestOutput, RequestOutput
from nanovllm.server.http.errors import error_response, problem_of
from nanovllm.server.http.json_io import dump_json, write_json
from nanovllm.server.openai.logprobs import TokenTexts
from nanovllm.server.openai.response_store import NOT_KEPT, ClientResponses
from nanovllm.server.openai.response_types import DraftedTokens, Usage
from nanovllm.server.openai.schemas import GenerationBody, SamplingBody, StreamOptions

B = TypeVar("B", bound=GenerationBody)
S = TypeVar("S", bound=SamplingBody)
OutputT = TypeVar("OutputT", RequestOutput, EmbeddingRequestOutput)
MANY_POSITIONS = 128  # with 20 log-probabilities each, writing them takes about 20 ms
TOKENS_PER_POSITION = 128  # whose ids take as long as the log-probabilities of a position


@dataclass(frozen=True, slots=True)
class ResponseContext:
    """What is known of a response before it has any output.

    Attributes:
        id: the response's id.
        created: the time, in seconds since 1970.
        model: the name that the client used for the model.
        prompt_tokens: total number of tokens of the prompts.
        tokenizer: the model's.
        stored: the client's stored responses.
        has_drafts: whether the server drafts tokens.
    """

    id: str
    created: int
    model: str
    prompt_tokens: int
    tokenizer: Tokenizer
    stored: ClientResponses = NOT_KEPT
    has_drafts: bool = False


class Renderer(ABC, Generic[B, OutputT]):
    """Renders the outputs of one request, whole by `body` or as a stream by the other methods.

    A stream is `begin`, deltas, and `end` or `error`; each returns whole server-sent events. An
    endpoint that does not stream has `body` only.

    Attributes:
        context: what is known of the response before it has any output.
        request: the body that it answers.
    """

    def __init__(self, context: ResponseContext, request: B) -> None:
        self.context = context
        self.request = request

    @abstractmethod
    def body(self, outputs: Sequence[OutputT]) -> Mapping[str, Any]:
        """Return the body of the whole response.

        A list may be an iterator, whose items are made one at a time while they are written.
        """

    def is_large(self, outputs: Sequence[OutputT]) -> bool:
        """Return whether the body must be written on a worker thread."""
        return is_large(outputs)

    def begin(self) -> bytes:
        """Return the events before any output."""
        return b""

    def delta(self, index: int, output: OutputT) -> bytes:
        """Return the events of what is new of the prompt at `index`; none if it is empty."""
        raise NotImplementedError

    def end(self) -> bytes:
        """Return the events after the last output."""
        raise NotImplementedError

    def error(self, error: Exception) -> bytes:
        """Return the events of a stream that ends with an error."""
        raise NotImplementedError


class ChoicesRenderer(Renderer[S, RequestOutput]):
    """Renders a list of choices; a stream has one choice in each chunk, and ends with [DONE]."""

    body_type: ClassVar[str]
    chunk_type: ClassVar[str]

    def __init__(self, context: ResponseContext, request: S) -> None:
        super().__init__(context, request)
        self._options = request.stream_options or StreamOptions.model_validate({})
        self._outputs: dict[int, RequestOutput] = {}  # the last one of each prompt
        self._num_tokens: Counter[tuple[int, int]] = Counter()  # by prompt and choice
        self._is_first_chunk = True

    @abstractmethod
    def choices(self, outputs: Sequence[RequestOutput]) -> Iterator[Mapping[str, Any]]:
        """Yield the choices of a whole response; one may be large."""

    @abstractmethod
    def pieces(
        self, index: int, delta: CompletionOutput, output: RequestOutput
    ) -> Sequence[Mapping[str, Any]]:
        """Return what is new of a choice of the prompt at `index`, a piece for each chunk.

        The last piece has the tokens of `delta`; those before it have none.
        """

    def token_texts(
        self, *, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()
    ) -> TokenTexts:
        """Return what shows the tokens of a text after a prompt, as the request wants them."""
        return TokenTexts(
            self.context.tokenizer,
            skip_special_tokens=skip_special_tokens,
            as_token_ids=bool(self.request.return_tokens_as_token_ids),
            prompt_token_ids=prompt_token_ids,
        )

    def drafted_tokens(self, choice: CompletionOutput) -> DraftedTokens:
        """Return the field about the drafted tokens of a choice, if requested."""
        if not self.request.return_drafted_token_ids:
            return {}
        return {"drafted_token_ids": choice.drafted_token_ids if self.context.has_drafts else None}

    def prompt_fields(self, output: RequestOutput) -> Mapping[str, Any]:
        """Return the fields about the prompt beside the choices; null if not requested."""
        return {}

    def body(self, outputs: Sequence[RequestOutput]) -> Mapping[str, Any]:
        """Return the body of the whole response."""
        return {
            **self._head(self.body_type), "service_tier": None, "system_fingerprint": None,
            "choices": self.choices(outputs), "usage": self._usage(outputs),
            **self.prompt_fields(outputs[0]),
        }  # fmt: skip

    def delta(self, index: int, output: RequestOutput) -> bytes:
        """Return a chunk for each choice that has something new."""
        self._outputs[index] = output
        encode = write_json if is_large([output]) else dump_json
        chunks = []
        for delta in output.outputs:
            self._num_tokens[index, delta.index] += len(delta.token_ids)
            pieces = self.pieces(index, delta, output)
            for piece in pieces:
                num_tokens = self._num_tokens[index, delta.index] if piece is pieces[-1] else 0
                chunks.append(b"data: " + encode(self._chunk(piece, output, num_tokens)) + b"\n\n")
        return b"".join(chunks)

    def _chunk(
        self, piece: Mapping[str, Any], output: RequestOutput, num_tokens: int
    ) -> dict[str, Any]:
        """Return a chunk whose choice has `num_tokens` tokens so far."""
        chunk = {**self._head(self.chunk_type), "choices": [piece]}
        if self._options.include_usage:
            chunk["usage"] = None
        if self._options.include_usage and self._options.continuous_usage_stats:
            num_prompt_tokens = len(output.prompt_token_ids)
            chunk["usage"] = make_usage(num_prompt_tokens, num_tokens, output.num_cached_tokens)
        if self._is_first_chunk:
            fields = self.prompt_fields(output)
            chunk |= {name: value for name, value in fields.items() if value is not None}
            self._is_first_chunk = False
        return chunk

    def end(self) -> bytes:
        """Return the usage, if requested, and [DONE]."""
        if not self._options.include_usage:
            return _DONE
        usage = self._usage(self._outputs.values())
        chunk = {**self._head(self.chunk_type), "choices": [], "usage": usage}
        return b"data: " + dump_json(chunk) + b"\n\n" + _DONE

    def _usage(self, outputs: Collection[RequestOutput]) -> Usage:
        """Return the usage; with speculative decoding, with OpenAI's counts of predicted tokens."""
        usage = usage_of(outputs)
        if self.context.has_drafts:
            accepted = sum(output.num_accepted_tokens for output in outputs)
            drafted = sum(output.num_drafted_tokens for output in outputs)
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            }
        return usage

    def error(self, error: Exception) -> bytes:
        """Return the error, whose status can only follow in the stream, and [DONE]."""
        return b"data: " + bytes(error_response(*problem_of(error)).body) + b"\n\n" + _DONE

    def _head(self, object_type: str) -> dict[str, Any]:
        context = self.context
        return {
            "id": context.id, "object": object_type, "created": context.created,
            "model": context.model,
        }  # fmt: skip


def usage_of(outputs: Collection[RequestOutput]) -> Usage:
    """Return the usage of a response from the last output of each prompt."""
    return make_usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(output.num_generated_tokens for output in outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


def make_usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """Return a usage object.

    Each prompt counts once, and every choice that is generated: also those that best_of leaves out,
    and equal ones that are computed once.
    """
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }  # fmt: skip


def is_large(outputs: Sequence[Any]) -> bool:
    """Return whether outputs, or deltas, must be written on a worker thread.

    Writing the log-probabilities of many positions, or many texts or token ids, takes too long for
    the event loop. The prompt is written with the first output of each choice.
    """
    prompts = sum(len(output.prompt_logprobs or ()) * len(output.outputs) for output in outputs)
    choices = sum(len(choice.logprobs or ()) for output in outputs for choice in output.outputs)
    tokens = 0
    for output in outputs:
        new = sum(len(choice.token_ids) for choice in output.outputs)
        is_first = output.finished or output.num_generated_tokens == new
        tokens += new + is_first * len(output.prompt_token_ids) * len(output.outputs)
    return prompts + choices + tokens // TOKENS_PER_POSITION > MANY_POSITIONS


_DONE = b"data: [DONE]\n\n"
