"""The library of compiled operations, apart from inference: neither makes the other larger."""

from nanovllm.model.kernels.build.codegen import Library
from nanovllm.model.kernels.build.target import KernelTarget, Spec
from nanovllm.model.kernels.library import (
    POOL_ENTRIES,
    EntryPoints,
    digest_of_sources,
    load_library,
)
from nanovllm.training.kernels.records import RECORDS

TRAINING = EntryPoints(__package__, (*RECORDS, *POOL_ENTRIES), digest_of_sources(__package__))


def load_operations(target: KernelTarget) -> Library:
    """Return the operations for a CPU, from the cache or compiled."""
    return load_library(Spec(target), TRAINING)
