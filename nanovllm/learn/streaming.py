"""Streamed text by the reader's Utf8Stream and StopStrings (step 10), and what a learn engine
refuses.
"""

import codecs
from collections.abc import Sequence
from dataclasses import replace

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.sequence_output import SequenceOutput
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.learn.guard import TEXT_S, Guard, check_text, wrong
from nanovllm.learn.parts import Parts
from nanovllm.model.config import ModelConfig
from nanovllm.sampling_params import SamplingParams


class CourseInputProcessor(InputProcessor):
    """Refuses what the course's scheduler cannot do, and streams text by the reader's code."""

    def __init__(
        self,
        parts: Parts,
        guard: Guard,
        model: ModelConfig,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        seed: int | None = None,
    ) -> None:
        """Create an input processor; arguments are those of InputProcessor.

        The course's scheduler counts the last token of an output too, so a request may be one token
        shorter.
        """
        shorter = replace(limits, cache_tokens=limits.cache_tokens - 1)
        super().__init__(model, tokenizer, shorter, seed=seed)
        self._parts, self._guard = parts, guard

    def process(self, request: GenerationRequest) -> tuple[PromptRequest, ...]:
        """Check and tokenize the prompts of a request, as InputProcessor does."""
        has_grammar = getattr(request.params, "structured_outputs", None) is not None
        for is_given, name in (
            (has_grammar, "structured_outputs"),
            (request.cache_salt, "cache_salt"),
            (request.priority, "priority"),
        ):
            if is_given:
                raise InvalidRequestError(
                    f"{name} cannot be used with backend 'learn': the course's scheduler has no "
                    "such thing; leave it out, or use another backend",
                    param=name,
                )
        return super().process(request)

    def begin_output(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> SequenceOutput:
        """Return the output of a sequence without tokens, which continues a prompt."""
        output = super().begin_output(params, prompt_token_ids)
        if self.tokenizer.is_byte_level:
            output.decoder = CourseDecoder(self._parts, self._guard, self.tokenizer, params)
        if params.stop_strings and not params.min_tokens:  # which the course's cannot ignore
            output.stops = CourseStops(self._parts, self._guard, params)
        return output


class CourseDecoder(IncrementalDecoder):
    """Decodes the bytes of tokens with the reader's Utf8Stream."""

    def __init__(
        self, parts: Parts, guard: Guard, tokenizer: Tokenizer, params: SamplingParams
    ) -> None:
        """Start with no tokens; the tokenizer is byte-level."""
        super().__init__(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._utf8 = _Utf8(parts, guard)


class _Utf8(codecs.IncrementalDecoder):
    """The reader's Utf8Stream with the methods of Python's decoder of UTF-8."""

    def __init__(self, parts: Parts, guard: Guard) -> None:
        super().__init__("replace")
        self._guard = guard
        self._stream = guard.call(TEXT_S, parts["step10_streaming"].Utf8Stream)
        self._twin = codecs.getincrementaldecoder("utf-8")("replace")  # knows the pending bytes

    def decode(self, data: bytes, final: bool = False) -> str:  # type: ignore[override]
        """Return the characters that `data` completes, and at the end the rest."""
        self._twin.decode(data, final)
        push, flush = self._stream.push, self._stream.flush
        text = check_text(push, self._guard.call(TEXT_S, push, data)) if data else ""
        return text + check_text(flush, self._guard.call(TEXT_S, flush)) if final else text

    def getstate(self) -> tuple[bytes, int]:
        """Return the bytes of an incomplete character."""
        return self._twin.getstate()


class CourseStops(StopStrings):
    """Finds stop strings with the reader's StopStrings."""

    def __init__(self, parts: Parts, guard: Guard, params: SamplingParams) -> None:
        """Match the stop strings of `params`."""
        stops = tuple(params.stop_strings)
        super().__init__(stops, include_in_output=params.include_stop_str_in_output)
        self._guard = guard
        self._stream = guard.call(TEXT_S, parts["step10_streaming"].StopStrings, stops)

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return the text that can be released, and the stop string if one is complete."""
        push = self._stream.push
        found = self._guard.call(TEXT_S, push, text)
        if not isinstance(found, tuple) or len(found) != 2:
            raise wrong(push, f"it returned {found!r:.60}, expected (text, stop string or None)")
        released, stop = found
        if stop is not None and stop not in self._stops:
            raise wrong(push, f"it found {stop!r:.60}, which is not one of the stop strings")
        shows = stop is not None and (self._include or not may_stop)
        released = check_text(push, released) + (stop if shows else "")
        return released, stop if may_stop else None

    def flush(self) -> str:
        """Return the held text when the output ends without a stop string."""
        flush = self._stream.flush
        return check_text(flush, self._guard.call(TEXT_S, flush))
