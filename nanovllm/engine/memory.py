"""How an engine fits the memory of its process, planned before the first request.

    used            by the process when the model is loaded: interpreter, libraries, weights
    working memory  activations, logits and scratch of the largest step
    reserve         child processes, requests, slack of the allocator
    KV cache        as configured, or what is left
    log-probabilities of unwritten responses, and bodies of requests, on a server: half of the rest

The cache becomes resident when it is first written to. Without a plan, a process whose cache is too
large for its container starts, and is killed by the kernel after some hundred prompts.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.config import EngineConfig, format_bytes
from nanovllm.model.backend import Backend
from nanovllm.model.config import ModelConfig
from nanovllm.model.machine import MemoryLimit

logger = logging.getLogger(__name__)

RESERVE_BYTES = 64 << 20
"""Memory of a small model's child processes (grammars, chat templates, inspection), and of requests
without their log-probabilities. Library code, which the kernel can drop, counts as used."""
_SERVER_PART = 4  # the cache leaves a quarter of the rest to a server
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "auto": 2}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts of the memory below a limit.

    Attributes:
        limit: None if there is none.
        other_bytes: used, working memory and reserve.
        num_blocks: blocks of the KV cache.
        cache_bytes: their memory.
    """

    limit: MemoryLimit | None
    other_bytes: int
    num_blocks: int
    cache_bytes: int

    @property
    def free_bytes(self) -> int | None:
        """Bytes for log-probabilities and for bodies of requests; None without a limit."""
        if self.limit is None:
            return None
        return self.limit.num_bytes - self.other_bytes - self.cache_bytes


def weights_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Return the memory of the weights."""
    return _WEIGHT_BYTES[config.quantization or config.dtype] * model.num_parameters


def check_sizes(
    config: EngineConfig,
    model: ModelConfig,
    limit: MemoryLimit | None,
    draft: tuple[EngineConfig, ModelConfig] | None = None,
) -> None:
    """Raise ValueError if the weights, or they and a KV cache of a set size, exceed the limit.

    The weights are those of the model and of its draft model, given by settings and shape. This
    needs no weights. `plan_memory` checks the rest.
    """
    if limit is None:
        return
    needed = weights_bytes(config, model)
    remedy = "raise it, set a narrower dtype or quantization, or choose a smaller model"
    text = f"the weights need {_described_weights(config, needed)}"
    if draft is not None:
        draft_bytes = weights_bytes(*draft)
        if needed <= limit.free_bytes < needed + draft_bytes:
            remedy = "raise it, or choose a smaller draft model or none"
        needed += draft_bytes
        text += f" and those of the draft model {_described_weights(draft[0], draft_bytes)}"
    is_cache_set = not config.has_default_cache and config.num_blocks is None
    if needed <= limit.free_bytes and is_cache_set:
        needed += config.kv_cache_bytes
        remedy = "lower kv_cache_memory, or raise the limit"
        text += f" and the KV cache {format_bytes(config.kv_cache_bytes)}"
    if needed > limit.free_bytes:
        raise ValueError(
            f"{text}, but {limit.name} is {format_bytes(limit.num_bytes)}, of which "
            f"{format_bytes(limit.used_bytes)} are used; {remedy}"
        )


def _described_weights(config: EngineConfig, num_bytes: int) -> str:
    kind = config.quantization or config.dtype
    return f"{format_bytes(num_bytes)} in {'bfloat16' if kind == 'auto' else kind}"


def max_sampled_rows(config: EngineConfig) -> int:
    """Return the maximum number of rows of a step that get a token, drafted ones included."""
    speculation = config.speculation
    num_drafted = 0 if speculation is None else speculation.num_speculative_tokens
    return min(config.max_num_seqs * (1 + num_drafted), config.max_num_batched_tokens)


def plan_memory(
    config: EngineConfig,
    backends: Sequence[Backend],
    max_model_len: int,
    limit: MemoryLimit | None,
) -> MemoryPlan:
    """Return the plan of an engine whose weights are loaded.

    `backends` are that of the model, and that of the draft model if there is one.
    A cache of the default size shrinks to what is left, at least that of a single request of
    `max_model_len` tokens. Raises ValueError if this or a chosen size does not fit.
    """
    block_bytes = sum(backend.block_bytes(config.block_size) for backend in backends)
    num_blocks = config.num_blocks or config.kv_cache_bytes // block_bytes
    if num_blocks == 0:
        raise ValueError(
            f"kv_cache_memory is {config.kv_cache_bytes} bytes, less than one block of "
            f"{config.block_size} tokens ({block_bytes} bytes); raise it or lower block_size"
        )
    max_rows = max_sampled_rows(config)
    working_bytes = sum(
        backend.working_bytes(config.max_num_batched_tokens, max_rows, config.block_size)
        for backend in backends
    )
    other_bytes = working_bytes + RESERVE_BYTES + (0 if limit is None else limit.used_bytes)
    if limit is None:
        return MemoryPlan(None, other_bytes, num_blocks, num_blocks * block_bytes)
    room_bytes = limit.num_bytes - other_bytes
    is_default = config.has_default_cache
    wanted = needed = num_blocks
    if is_default:
        num_blocks = min(wanted, (room_bytes - room_bytes // _SERVER_PART) // block_bytes)
        needed = min(wanted, -(-max_model_len // config.block_size))
    cache_bytes = num_blocks * block_bytes
    text = (
        f"{limit.name} is {format_bytes(limit.num_bytes)}, of which model and process need "
        f"{format_bytes(other_bytes)}"
    )
    if "numba" in sys.modules:  # only a start that compiles imports it
        text += " (the next start less, because it need not compile the kernels again)"
    if num_blocks < needed or cache_bytes > room_bytes:
        what = "one request" if is_default else "the KV cache"
        raise ValueError(
            f"{text} and {what} {format_bytes(needed * block_bytes)}; raise the limit, or lower "
            f"{'max_model_len' if is_default else 'kv_cache_memory'}, max_num_batched_tokens or "
            "the precision (dtype, quantization)"
            + (", or choose a smaller draft model or none" if len(backends) > 1 else "")
        )
    if num_blocks < wanted:
        logger.warning(
            "the KV cache has %s instead of %s, because %s",
            format_bytes(cache_bytes),
            format_bytes(wanted * block_bytes),
            text,
        )
    return MemoryPlan(limit, other_bytes, num_blocks, cache_bytes)


def allocate_cache(num_blocks: int, block_size: int, backends: Sequence[Backend]) -> int:
    """Allocate the KV caches and return their number of blocks; raises ValueError if it cannot."""
    num_bytes = num_blocks * sum(backend.block_bytes(block_size) for backend in backends)
    try:
        for backend in backends:
            backend.allocate_cache(num_blocks, block_size)
    except MemoryError:
        raise ValueError(
            f"the operating system cannot provide {format_bytes(num_bytes)} for the KV cache; "
            "lower kv_cache_memory"
        ) from None
    return num_blocks
