"""What a step does with the token budget and the free blocks that nothing else needs."""

from dataclasses import replace

from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.scheduling.step_plan import PlannedSequence, StepBuilder


def extend_chunks(step: StepBuilder, kv_cache: KVCacheManager) -> None:
    """Extend the chunks of prompts that were limited."""
    for sequence in list(step.sequences.values()):
        request, count = sequence.request, sequence.count
        missing = request.num_uncomputed_tokens - count
        if missing == 0:
            continue
        room = kv_cache.max_tokens(request) - sequence.start - count
        more = min(step.tokens_left, missing, room)
        if more > 0:
            kv_cache.extend_slots(request, count + more)
            step.put(PlannedSequence.of(request, count + more))
            kv_cache.cache_blocks(request, request.num_computed_tokens + count + more)


def verify_drafted(step: StepBuilder, kv_cache: KVCacheManager) -> None:
    """Add drafted tokens to decoding requests; a block is cached when its tokens are accepted."""
    for sequence in list(step.sequences.values()) if step.tokens_left else ():
        request = sequence.request
        if not request.drafted or not request.is_decoding:
            continue
        room = kv_cache.max_tokens(request) - sequence.start - 1
        count = min(len(request.drafted), step.tokens_left, room)
        if count > 0:
            kv_cache.extend_slots(request, 1 + count)
            step.put(replace(sequence, count=1 + count, drafted=request.drafted[:count]))
