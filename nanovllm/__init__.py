"""GPT-2 inference for CPUs: `LLM` in a program, `nanovllm serve` for an OpenAI-compatible server.

The names below are loaded when they are first asked for (PEP 562), so that a part of the package, such as nanovllm.model, can be
imported without the rest.
"""

from importlib import import_module

TYPE_CHECKING = False  # as typing's, which takes longer to import than all of this file
if TYPE_CHECKING:
    from typing import Any

    from nanovllm.config import EngineConfig
    from nanovllm.engine.async_engine import AsyncEngine
    from nanovllm.engine.beam_search import BeamSearchParams
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, EmbeddingRequestOutput, Logprob, RequestOutput
    from nanovllm.sampling_params import SamplingParams
    from nanovllm.structured_outputs import StructuredOutputs

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "nanovllm.engine.async_engine",
    "BeamSearchParams": "nanovllm.engine.beam_search",
    "CompletionOutput": "nanovllm.outputs",
    "EmbeddingRequestOutput": "nanovllm.outputs",
    "EngineConfig": "nanovllm.config",
    "LLM": "nanovllm.llm",
    "Logprob": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutputs": "nanovllm.structured_outputs",
}


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
