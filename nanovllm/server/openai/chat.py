"""POST /v1/chat/completions: its parser and its renderer.

The chat template makes a prompt of the messages. From there on a chat is a completion of token ids.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.server.openai import response_types as types
from nanovllm.server.openai.beams import beam_search_params, check_beam_fields
from nanovllm.server.openai.chat_prompt import encode_messages, end_turn
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.completions import generation_request, sampling_fields
from nanovllm.server.openai.endpoint import Endpoint, sampling_params
from nanovllm.server.openai.logprobs import TokenTexts, finite, prompt_logprobs, push_all, top
from nanovllm.server.openai.renderer import ChoicesRenderer, ResponseContext


def parse_chat(
    body: ChatRequest, engine: Engine, template: ChatTemplate | None
) -> GenerationRequest:
    """Return the request of a body; raises InvalidRequestError, also without a template."""
    if body.use_beam_search:
        check_beam_fields(body)
    is_truncated = body.truncate_prompt_tokens is not None
    prompt = encode_messages(
        body.messages,
        body,
        template,
        engine.tokenizer,
        partial(engine.input_processor.reader.check_text, is_truncated=is_truncated),
        add_special_tokens=body.add_special_tokens,
    )
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if body.use_beam_search:
        limits = engine.input_processor.limits
        room = min(limits.max_model_len, limits.cache_tokens) - len(prompt)
        if room < 1:
            raise ContextLengthError(
                f"the messages have {len(prompt)} tokens, which leaves no room for an answer; "
                "shorten them",
                param="messages",
            )
        params = beam_search_params(body, room if max_tokens is None else max_tokens)
        return generation_request(body, [prompt], params)
    limit = engine.input_processor.limits.max_logprobs
    if (body.top_logprobs or 0) > limit:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, the limit is {limit} (max_logprobs)",
            param="top_logprobs",
        )
    fields = sampling_fields(body) | {
        "max_tokens": max_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    settings = sampling_params(engine, **fields)
    return generation_request(body, [prompt], end_turn(settings, template, engine))


class ChatRenderer(ChoicesRenderer[ChatRequest]):
    """Renders chats: choices with a message, or with what is new of one.

    The first chunk of a choice has the role and no text, as OpenAI and vLLM send it. It is sent
    together with the choice's first piece, so that clients measure the time to the first token.
    """

    body_type = "chat.completion"
    chunk_type = "chat.completion.chunk"

    def __init__(self, context: ResponseContext, request: ChatRequest) -> None:
        super().__init__(context, request)
        self._begun: set[int] = set()
        self._texts: dict[int, TokenTexts] = {}  # by choice

    def prompt_fields(self, output: RequestOutput) -> types.PromptFields:
        """Return the fields about the prompt beside the choices; null if not requested."""
        has_logprobs = self.request.prompt_logprobs is not None
        return {
            "prompt_logprobs": prompt_logprobs(output.prompt_logprobs) if has_logprobs else None,
            "prompt_token_ids": output.prompt_token_ids if self.request.return_token_ids else None,
        }

    def choices(self, outputs: Sequence[RequestOutput]) -> Iterator[types.ChatChoice]:
        """Yield the choices of a whole response."""
        for choice in outputs[0].outputs:
            yield {
                "index": choice.index,
                "message": {
                    "role": self.request.role,
                    "content": self.request.echoed_text + choice.text, "refusal": None,
                    "annotations": None, "audio": None, "function_call": None, "reasoning": None,
                },
                "logprobs": self._logprobs(choice, self._token_texts(outputs[0])),
                "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
                "token_ids": choice.token_ids if self.request.return_token_ids else None,
                **self.drafted_tokens(choice),
            }  # fmt: skip

    def pieces(
        self, index: int, delta: CompletionOutput, output: RequestOutput
    ) -> list[types.ChatChunkChoice]:
        """Return what is new of a choice, after its role; nothing if that is empty."""
        is_first = delta.index not in self._begun
        piece = self._piece(delta, output, is_first=is_first)
        if piece is None:
            return []
        self._begun.add(delta.index)
        return [self._role_piece(delta.index), piece] if is_first else [piece]

    def _role_piece(self, index: int) -> types.ChatChunkChoice:
        """Return the first piece of a choice, which has no token."""
        return {
            "index": index, "delta": {"role": self.request.role, "content": ""},
            "logprobs": {"content": [], "refusal": None} if self.request.logprobs else None,
            "finish_reason": None, "stop_reason": None,
            "token_ids": [] if self.request.return_token_ids else None,
        }  # fmt: skip

    def _piece(
        self, delta: CompletionOutput, output: RequestOutput, *, is_first: bool
    ) -> types.ChatChunkChoice | None:
        """Return a piece of a choice; None if it has nothing to show."""
        request = self.request
        text = (request.echoed_text if is_first else "") + delta.text
        content: types.ChatDelta = {"content": text} if text else {}
        if delta.index not in self._texts:
            self._texts[delta.index] = self._token_texts(output)
        logprobs = self._logprobs(delta, self._texts[delta.index])
        has_more = request.return_token_ids or (is_first and request.prompt_logprobs is not None)
        if not (content or delta.finish_reason or has_more or (logprobs and logprobs["content"])):
            return None
        return {
            "index": delta.index, "delta": content, "logprobs": logprobs,
            "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if request.return_token_ids else None,
            **self.drafted_tokens(delta),
        }  # fmt: skip

    def _token_texts(self, output: RequestOutput) -> TokenTexts:
        return self.token_texts(
            skip_special_tokens=self.request.skip_special_tokens,
            prompt_token_ids=output.prompt_token_ids,
        )

    def _logprobs(self, delta: CompletionOutput, texts: TokenTexts) -> types.ChatLogprobs | None:
        """Return an entry for each token, with its bytes and the top tokens of its position.

        `texts` has seen the earlier tokens of the choice.
        """
        if delta.logprobs is None:
            return None
        tokenizer, count = self.context.tokenizer, self.request.top_logprobs or 0
        content: list[types.ChatTokenLogprob] = []
        is_end = delta.finish_reason is not None
        for shown in push_all(texts, delta.token_ids, delta.logprobs, is_end=is_end):
            position = shown.logprobs or {}
            tops = [
                _entry(tokenizer, other, logprob, shown.texts[other])
                for other, logprob in top(position, count)[:count]
            ]
            token_id = shown.token_id
            entry = _entry(tokenizer, token_id, position[token_id], shown.texts[token_id])
            content.append({**entry, "top_logprobs": tops})
        return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: Logprob, text: str) -> types.TokenLogprob:
    """Return an entry with the token's own bytes, which may be a part of a character."""
    data = tokenizer.token_bytes(token_id)
    return {"token": text, "logprob": finite(logprob.logprob), "bytes": list(data)}


CHAT = Endpoint(
    path="/v1/chat/completions",
    name="chat_completions",
    description="Answer a conversation.",
    id_prefix="chatcmpl-",
    body=ChatRequest,
    parse=parse_chat,
    renderer=ChatRenderer,
    response=types.ChatCompletion,
    event=types.ChatCompletionChunk,
    uses_process=True,
)
