"""EngineParts: the parts of an engine that another implementation may replace."""

from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.config import EngineConfig
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.model.backend import BackendLoader


def make_scheduler(config: EngineConfig, num_blocks: int) -> Scheduler:
    """Return this project's scheduler for a KV cache of `num_blocks` blocks."""
    blocks = BlockManager(
        num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    return Scheduler(
        KVCacheManager(blocks),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        is_fair=config.scheduling_policy == "fair",
    )


@dataclass(frozen=True, slots=True)
class PartOwner:
    """Whose code a part of an engine is.

    Attributes:
        part: the part, such as "attention".
        is_readers: whether it is the reader's of the course; otherwise it is this project's.
    """

    part: str
    is_readers: bool


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        backend: loads the network; None for the one that the settings name.
        make_scheduler: returns the scheduler, with its block manager.
        input_processor: checks requests, and begins their outputs.
        name: of the backend, for people; empty for the settings' own name.
        owners: whose code the parts are; empty if all are this project's.
    """

    backend: BackendLoader | None = None
    make_scheduler: Callable[[EngineConfig, int], Scheduler] = make_scheduler
    input_processor: Callable[..., InputProcessor] = InputProcessor
    name: str = ""
    owners: tuple[PartOwner, ...] = ()


OWN_PARTS = EngineParts()
