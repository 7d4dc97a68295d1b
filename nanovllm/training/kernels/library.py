"""The library of compiled operations, apart from inference: neither makes the other larger."""

from nanovllm.model.kernels.build.codegen import Library
from nanovllm.model.kernels.build.target import KernelTarget, Spec
from nanovllm.model.kernels.library import (
    COMPILED_IN,
    POOL_ENTRIES,
    EntryPoints,
    digest_of_sources,
    load_library,
)
from nanovllm.training.kernels.records import RUN_CALLS

_COMPILED_IN = (*COMPILED_IN, __package__, "nanovllm.training.network.dropout")
TRAINING = EntryPoints(
    __package__,
    "training",
    (RUN_CALLS, *POOL_ENTRIES),
    _COMPILED_IN,
    digest_of_sources(_COMPILED_IN),
)


def load_operations(target: KernelTarget) -> Library:
    """Return the operations for a CPU, from the cache or compiled."""
    return load_library(Spec(target), TRAINING)
