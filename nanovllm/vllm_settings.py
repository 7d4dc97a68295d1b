"""Error messages for unknown settings, with the alternative to vLLM's."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from nanovllm.suggestions import suggest

P = ParamSpec("P")
T = TypeVar("T")

_LEAVE_OUT = "nanovllm runs on the CPU, in one process; leave it out"
_INSTEAD = {
    "gpu_memory_utilization": f"{_LEAVE_OUT}, and set kv_cache_memory for the size of the KV cache",
    "tensor_parallel_size": f"{_LEAVE_OUT}, and set num_threads for the number of threads",
    "pipeline_parallel_size": _LEAVE_OUT,
    "data_parallel_size": _LEAVE_OUT,
    "distributed_executor_backend": _LEAVE_OUT,
    "enforce_eager": f"{_LEAVE_OUT}, there are no CUDA graphs",
    "max_seq_len_to_capture": f"{_LEAVE_OUT}, there are no CUDA graphs",
    "disable_custom_all_reduce": _LEAVE_OUT,
    "device": _LEAVE_OUT,
    "swap_space": _LEAVE_OUT,
    "cpu_offload_gb": _LEAVE_OUT,
    "trust_remote_code": "the code of a checkpoint is never run; leave it out",
    "kv_cache_memory_bytes": "set kv_cache_memory instead",
    "num_gpu_blocks_override": "set num_blocks instead",
    "tokenizer": "the tokenizer is the one in the model's folder; leave it out",
    "tokenizer_mode": "the tokenizer is the one in the model's folder; leave it out",
    "load_format": "weights are read from safetensors files; leave it out",
    "download_dir": "fetch the model by `nanovllm download`, and give its folder",
    "revision": "fetch the model by `nanovllm download`, and give its folder",
    "code_revision": "the code of a checkpoint is never run; leave it out",
    "speculative_model": "set the key model of speculative_config instead",
    "num_speculative_tokens": "set it as a key of speculative_config",
    "max_model_len": "set max_model_len of the engine, which counts for both models",
    "draft_tensor_parallel_size": f"{_LEAVE_OUT}, and set num_threads for both models",
    "disable_by_batch_size": "fewer tokens are drafted where they would not pay; leave it out",
    "disable_logprobs": "log-probabilities are the same with drafts; leave it out",
    "disable_padded_drafter_batch": "no batch is padded; leave it out",
    "parallel_drafting": "a draft model drafts one token after another; leave it out",
    "speculative_token_tree": "drafts are sequences, not trees; leave it out",
    "suffix_decoding_max_tree_depth": 'set method to "ngram", and prompt_lookup_max',
    "suffix_decoding_max_spec_factor": 'set method to "ngram", and num_speculative_tokens',
    "use_heterogeneous_vocab": "choose a draft model with the tokenizer of the model",
    **dict.fromkeys(
        (
            "rejection_sample_method", "acceptance_method", "draft_sample_method",
            "spec_decoding_acceptance_method", "posterior_threshold", "posterior_alpha",
        ),
        "a drafted token is accepted exactly if it is the token that is drawn; leave it out",
    ),
}  # fmt: skip


def advice(name: str, known: Collection[str]) -> str:
    """Return what to do instead of setting `name`, which is none of `known`."""
    near = suggest(name, known)
    return _INSTEAD.get(name) or (
        f"did you mean {near!r}?" if near else f"it takes {', '.join(known)}"
    )


def unknown_setting_error(caller: str, name: str, known: Collection[str]) -> TypeError:
    """Return the error for an unknown argument `name` of `caller`, which takes `known`."""
    return TypeError(
        f"{caller}() got an unexpected keyword argument {name!r}: {advice(name, known)}"
    )


def takes_settings(settings: type) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Wrap an `__init__` whose keyword arguments are the fields of the dataclass `settings`.

    Its signature, which `help` shows, has the fields, and its TypeError for an unknown argument has
    advice.
    """

    def wrap(init: Callable[P, None]) -> Callable[P, None]:
        caller = init.__qualname__.removesuffix(".__init__")
        own = inspect.signature(init).parameters.values()
        parameters = [
            *(parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD),
            *inspect.signature(settings).parameters.values(),
        ]
        known = [parameter.name for parameter in parameters if parameter.name != "self"]

        @wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            for name in kwargs:
                if name not in known:
                    raise unknown_setting_error(caller, name, known)
            init(*args, **kwargs)

        vars(checked)["__signature__"] = inspect.Signature(parameters)
        return checked

    return wrap


def suggests_fields(cls: type[T]) -> type[T]:
    """Give a dataclass a TypeError with advice for a keyword argument that is none of its fields.

    Nothing is added to the time of a valid call.
    """
    init = cls.__init__
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # a dataclass

    @wraps(init)
    def checked(self: T, *args: Any, **settings: Any) -> None:
        try:
            init(self, *args, **settings)
        except TypeError:
            for name in settings:
                if name not in known:
                    raise unknown_setting_error(cls.__name__, name, known) from None
            raise

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses an assignment
    return cls
