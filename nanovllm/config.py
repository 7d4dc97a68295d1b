"""EngineConfig: the settings of an engine, named as in vLLM and checked on construction."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, TypeGuard, get_args

from annotated_types import Interval

from nanovllm.checked_fields import check_fields
from nanovllm.speculative_config import SpeculativeConfig

BackendName: TypeAlias = Literal["numba", "numpy"]
DType: TypeAlias = Literal["float32", "bfloat16", "auto"]
Quantization: TypeAlias = Literal["int8"]
KVCacheDType: TypeAlias = Literal["auto", "float32", "bfloat16", "int8"]
SchedulingPolicy: TypeAlias = Literal["fcfs", "priority", "fair"]
Precision: TypeAlias = Literal["float32", "bfloat16", "int8"]
Positive: TypeAlias = Annotated[int, Interval(ge=1)]

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""Types of the weights, by dtype or by quantization."""

BUNDLED_MODEL = "tiny-books"
DRAFT_MODEL = "tiny-books-draft"
BUNDLED_MODELS = (BUNDLED_MODEL, DRAFT_MODEL)
"""The default model, and a smaller one with its tokenizer, for speculative decoding."""

_AUTO_CACHE_BYTES = 1 << 30
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tb": 10**12,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}


class EngineSettings(TypedDict, total=False):
    """Keyword arguments of EngineConfig, for functions that forward them."""

    dtype: DType
    quantization: Quantization | None
    kv_cache_dtype: KVCacheDType
    backend: BackendName
    max_model_len: int | None
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | str
    num_blocks: int | None
    enable_prefix_caching: bool
    batch_invariant: bool
    num_threads: int | None
    seed: int | None
    max_logprobs: int
    scheduling_policy: SchedulingPolicy
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; raises ValueError naming the value, the limit and the remedy.

    Attributes:
        dtype: type of the weights in memory. With `quantization`, of the token embedding only.
            "auto" is bfloat16 for a checkpoint stored as bfloat16, and float32 otherwise.
        quantization: type that weights are quantized to on load; None for none. With "int8",
            activations are quantized too, row by row.
        kv_cache_dtype: type of the KV cache; auto is float32 for float32 weights, else bfloat16.
        backend: implementation of the forward pass; numba is compiled, numpy is the readable
            specification. "numpy" computes in float32 only.
        max_model_len: maximum tokens of prompt and output together; None for the model's context.
        block_size: tokens per block of the KV cache.
        max_num_seqs: maximum sequences in one step.
        max_num_batched_tokens: maximum tokens computed in one step; longer prompts are computed in
            chunks.
        kv_cache_memory: memory of the KV cache, such as 512MiB; auto is 1GiB, less where memory is
            limited. A number is in bytes.
        num_blocks: size of the KV cache in blocks, instead of kv_cache_memory; None for as many
            as that holds.
        enable_prefix_caching: reuse the KV cache of shared prompt prefixes.
        batch_invariant: make results bit-identical in any batch; slower with numpy, always so with
            numba.
        num_threads: compute threads; None for the usable physical cores.
        seed: seed of requests that have none; None for random.
        max_logprobs: maximum log-probabilities per position that a request may ask for.
        scheduling_policy: order of requests: by arrival, priority or equal shares of clients. With
            "priority" any client may choose its priority.
        speculative_config: how tokens are drafted, which changes no bit (with numpy, if
            batch_invariant is set); None for no drafts. A mapping has the fields of
            SpeculativeConfig.
    """

    dtype: DType = "float32"
    quantization: Quantization | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    backend: BackendName = "numba"
    max_model_len: Positive | None = None
    block_size: Positive = 32
    max_num_seqs: Positive = 32
    max_num_batched_tokens: Positive = 512
    kv_cache_memory: int | str = "auto"
    num_blocks: Positive | None = None
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    num_threads: Positive | None = None
    seed: int | None = None
    max_logprobs: Annotated[int, Interval(ge=0)] = 20
    scheduling_policy: SchedulingPolicy = "fcfs"
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "speculative_config", self.speculation)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs at least one token per step; "
                "raise the first or lower the second"
            )
        if self.backend == "numpy":
            self._check_numpy_types()
        _cache_bytes(self.kv_cache_memory)

    def _check_numpy_types(self) -> None:
        for name, allowed in (
            ("dtype", ("auto", "float32")),
            ("quantization", (None,)),
            ("kv_cache_dtype", ("auto", "float32")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} is {value!r}, but backend='numpy' computes in float32 only; "
                    "leave it out or set backend='numba'"
                )

    @property
    def kv_cache_bytes(self) -> int:
        """`kv_cache_memory` as a number of bytes, for "auto" the largest."""
        return _cache_bytes(self.kv_cache_memory)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config` as its class."""
        return SpeculativeConfig.of(self.speculative_config)

    @property
    def has_default_cache(self) -> bool:
        """Whether the size of the KV cache is left to the engine."""
        return self.kv_cache_memory == "auto" and self.num_blocks is None


def parse_bytes(size: int | str) -> int:
    """Return `size` in bytes: a number, or text such as "512MiB", "1.5GB" or "4G" (G is GiB)."""
    count = size if _is_int(size) else 0
    match = (
        re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", size)
        if isinstance(size, str)
        else None
    )
    if match is not None and match[2].lower() in _UNITS:
        count = int(float(match[1]) * _UNITS[match[2].lower()])
    if count < 1:
        raise ValueError(
            f"{size!r} is not a size of at least one byte; use a number of bytes, or text such as "
            "'512MiB' or '1.5GB'"
        )
    return count


def _cache_bytes(size: int | str) -> int:
    return _AUTO_CACHE_BYTES if size == "auto" else parse_bytes(size)


def format_bytes(count: int) -> str:
    """Return `count` bytes as readable text, such as "1.5 GiB"."""
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:,.1f} {unit}"


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
