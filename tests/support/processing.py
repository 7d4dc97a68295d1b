"""Prompts for an engine, one at a time."""

from typing import Any

from nanovllm.engine.generation_request import GenerationRequest, PoolingParams
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

_OPTIONS = ("priority", "cache_salt", "client")


def process(
    processor: InputProcessor,
    request_id: str,
    prompt: Prompt,
    params: SamplingParams | PoolingParams,
    **options: Any,
) -> PromptRequest:
    """Check and tokenize one prompt; its id is exactly `request_id`."""
    request = GenerationRequest(prompts=[prompt], params=params, request_id=request_id, **options)
    (processed,) = processor.process(request)
    processed.request_id = request_id
    for sequence in processed.requests:  # without the counter that makes ids unique
        sequence.request_id = sequence.request_id.partition("-")[2]
        sequence.parent_id = sequence.parent_id.partition("-")[2]
    return processed


def embed(
    processor: InputProcessor, request_id: str, prompt: Prompt, **settings: Any
) -> PromptRequest:
    """Check and tokenize one prompt to embed; `settings` are of PoolingParams or the request."""
    options = {name: settings.pop(name) for name in _OPTIONS if name in settings}
    return process(processor, request_id, prompt, PoolingParams(**settings), **options)
