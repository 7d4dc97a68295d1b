"""Statistics of the updates that a step delivers."""

from dataclasses import replace

from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.metrics import FinishedPrompt, FinishedRequest, StepStats
from nanovllm.engine.output_processor import SequenceUpdate


def count_update(stats: StepStats, prepared: PreparedRequest, update: SequenceUpdate) -> None:
    """Add an update to the statistics of its step, after the output processor has it."""
    output_processor, index = prepared.output_processor, update.choice_index
    times = update.metrics
    if update.token_ids:
        if update.inter_token_latency_s is not None:
            stats.inter_token_latencies_s.append(update.inter_token_latency_s)
        elif times is not None:
            stats.times_to_first_token_s.append(update.time_s - times.arrival_s)
    ended = output_processor.ended(index)
    if ended is not None and times is not None:
        reason, num_tokens = ended
        request = prepared.requests[index]
        stats.finished.append(
            FinishedRequest(
                reason.value,
                request.num_prompt_tokens,
                num_tokens,
                request.max_new_tokens,
                update.num_reused_tokens,
                update.num_preemptions,
                replace(times, finished_s=update.time_s),
            )
        )
        if output_processor.is_finished:
            stats.finished_prompts.append(
                FinishedPrompt(request.sampling.n, output_processor.max_output_tokens)
            )
