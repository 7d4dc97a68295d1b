"""Prompts for an engine or an input processor, one at a time."""

from typing import Any

from nanovllm.engine.generation_request import GenerationRequest, PoolingParams
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.config import ModelConfig
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams

CONTEXT = 16
MAX_LOGPROBS = 5
"""Limits of `make_input_processor`."""
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


def make_input_processor(
    tokenizer: Tokenizer,
    *,
    vocab: int | None = None,
    cache_tokens: int = 1000,
    seed: int | None = None,
    has_priorities: bool = False,
) -> InputProcessor:
    """Return an input processor of a model whose last token is the end of text."""
    vocab = vocab or tokenizer.vocab
    model = ModelConfig(
        vocab=vocab, max_positions=CONTEXT, d_model=8, layers=1, heads=1, d_ff=8,
        eos_token_ids=(vocab - 1,),
    )  # fmt: skip
    limits = Limits(CONTEXT, cache_tokens, MAX_LOGPROBS, has_priorities=has_priorities)
    return InputProcessor(model, tokenizer, limits, seed=seed)


def submit(input_processor: InputProcessor, prompt: Any = "hi", **settings: Any) -> PromptRequest:
    """Check and tokenize one prompt with the settings of SamplingParams."""
    return process(input_processor, "r", prompt, SamplingParams(**settings))
