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
}


def unknown_setting_error(caller: str, name: str, known: Collection[str]) -> TypeError:
    """Return the error for an unknown argument `name` of `caller`, which takes `known`."""
    near = suggest(name, known)
    advice = _INSTEAD.get(name) or (
        f"did you mean {near!r}?" if near else f"it takes {', '.join(known)}"
    )
    return TypeError(f"{caller}() got an unexpected keyword argument {name!r}: {advice}")


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
