"""GPT-2 inference for CPUs: `LLM` in a program, `nanovllm serve` for an OpenAI-compatible server.

The names below are imported on first use (PEP 562), so that a part of the package, such as
nanovllm.model, can be imported without the rest.

The package in reading order, from the model up to the command line:

model               the GPT-2 forward pass in NumPy, checkpoints, and the compiled kernels
runner              runs a batch: the forward pass, then the sampler
engine              continuous batching: scheduler, KV cache, requests
llm                 LLM, the Python API
async_llm           AsyncLLM, the same for asyncio
evaluation          evaluate: loss, perplexity and bits per byte of a checkpoint
trainer             Trainer: the training loop
trainable_model     TrainableModel: loss, gradients and optimizer for a loop of one's own
learn               the course, and an engine that runs its reader's code
server              the OpenAI-compatible HTTP API
batch               files of requests
inspection          attention, logit lens and embeddings of one prompt
training            from text files to a checkpoint: data, network, files and report
pages               HTML pages in one file, and the scripts that they share with the server's page
hub                 from model names to folders
cli                 the nanovllm command
deploy              replicas under Ray Serve
config              settings of an engine
sampling_params     settings of a request
structured_outputs  constraints on an output
speculative_config  how tokens are drafted
prompts             the forms of a prompt
outputs             what requests return
checked_fields      checks of settings by their annotations
vllm_settings       errors for unknown settings, with advice for those that vLLM has
suggestions         near names for misspelled ones
deadlines           the time by which a request must be complete
shares              how bounded room is divided between clients
errors              the public exceptions
progress            progress bars
stop_signal         stopping at Ctrl-C
"""

from importlib import import_module

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without the slow import of typing
if TYPE_CHECKING:
    from typing import Any

    from nanovllm.async_llm import AsyncLLM
    from nanovllm.config import EngineConfig
    from nanovllm.engine.async_engine import AsyncEngine
    from nanovllm.engine.generation_request import BeamSearchParams
    from nanovllm.engine.tokenizer import Tokenizer
    from nanovllm.errors import (
        CheckpointError,
        ContextLengthError,
        EngineError,
        EngineFaultError,
        EngineNotReadyError,
        InvalidRequestError,
        KernelError,
        ModelNotFoundError,
        NanovllmError,
        QueueFullError,
        RequestTimeoutError,
        TrainingError,
    )
    from nanovllm.evaluation import AblationResult, EvaluationResult, ablate, evaluate
    from nanovllm.llm import LLM
    from nanovllm.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from nanovllm.prompts import Prompt, TextPrompt, TokensPrompt
    from nanovllm.sampling_params import SamplingParams
    from nanovllm.speculative_config import SpeculativeConfig
    from nanovllm.structured_outputs import StructuredOutputs
    from nanovllm.trainable_model import TrainableModel
    from nanovllm.trainer import Trainer
    from nanovllm.training.config import TrainingConfig
    from nanovllm.training.network.optimizer import AdamW
    from nanovllm.training.network.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AblationResult",
    "AdamW",
    "AsyncEngine",
    "AsyncLLM",
    "BeamSearchParams",
    "CheckpointError",
    "CompletionOutput",
    "ContextLengthError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineError",
    "EngineFaultError",
    "EngineNotReadyError",
    "EvaluationResult",
    "InvalidRequestError",
    "KernelError",
    "Logprob",
    "ModelNotFoundError",
    "NanovllmError",
    "Prompt",
    "QueueFullError",
    "RequestMetrics",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "Schedule",
    "SpeculativeConfig",
    "StructuredOutputs",
    "TextPrompt",
    "Tokenizer",
    "TokensPrompt",
    "TrainableModel",
    "Trainer",
    "TrainingConfig",
    "TrainingError",
    "__version__",
    "ablate",
    "evaluate",
]

_EXPORTS = {
    "nanovllm.async_llm": ["AsyncLLM"],
    "nanovllm.config": ["EngineConfig"],
    "nanovllm.engine.async_engine": ["AsyncEngine"],
    "nanovllm.engine.generation_request": ["BeamSearchParams"],
    "nanovllm.engine.tokenizer": ["Tokenizer"],
    "nanovllm.errors": [name for name in __all__ if name.endswith("Error")],
    "nanovllm.evaluation": ["AblationResult", "EvaluationResult", "ablate", "evaluate"],
    "nanovllm.llm": ["LLM"],
    "nanovllm.outputs": [
        "CompletionOutput",
        "EmbeddingOutput",
        "EmbeddingRequestOutput",
        "Logprob",
        "RequestMetrics",
        "RequestOutput",
    ],
    "nanovllm.prompts": ["Prompt", "TextPrompt", "TokensPrompt"],
    "nanovllm.sampling_params": ["SamplingParams"],
    "nanovllm.speculative_config": ["SpeculativeConfig"],
    "nanovllm.structured_outputs": ["StructuredOutputs"],
    "nanovllm.trainable_model": ["TrainableModel"],
    "nanovllm.trainer": ["Trainer"],
    "nanovllm.training.config": ["TrainingConfig"],
    "nanovllm.training.network.optimizer": ["AdamW"],
    "nanovllm.training.network.schedule": ["Schedule"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> "Any":
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
