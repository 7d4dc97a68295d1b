"""The JSON documents of a state and of a step."""

from collections import deque
from typing import cast

from nanovllm.engine.engine import Engine
from nanovllm.engine.inspection.reasons import preemption_reason
from nanovllm.engine.inspection.recorder import StepRecord, StepSequence
from nanovllm.engine.inspection.state import InspectedEngine, InspectedRequest
from nanovllm.server.inspector import response_types as types
from nanovllm.server.service import Service

MAX_PROMPT_CHARACTERS = 200
_RATE_WINDOW_S = 1.0
_MAX_SAMPLE_AGE_S = 5.0


class StateDescriber:
    """Describes the states of one engine as JSON documents. For the event loop."""

    def __init__(self, service: Service) -> None:
        self._engine = service.engine
        self._metrics = service.metrics
        self._settings = service.settings
        self._config: types.InspectorConfig | None = None
        self._prompts: dict[str, str] = {}
        self._samples: deque[tuple[float, int, int, int]] = deque()

    def describe(self, state: InspectedEngine) -> types.EngineStateEvent:
        """Return the document of a state, with the rates since earlier ones."""
        engine, stats = self._engine.engine, state.stats
        # As in /metrics: the event loop knows which tokens come after a stop string.
        generation_tokens = self._engine.stats().generation_tokens
        if self._config is None:
            self._config = _config(engine, self._settings.model_names[0])
        if self._settings.inspector_shows_prompts:
            self._decode_prompts(engine, state.requests)
        return {
            "step": state.num_steps,
            "time_s": _round(state.uptime_s),
            "is_paused": state.is_paused,
            "pause_left_s": self._engine.inspector.pause_left_s if state.is_paused else None,
            "can_control": self._settings.inspector_controls,
            "shows_prompts": self._settings.inspector_shows_prompts,
            "config": self._config,
            "requests": [self._request(request) for request in state.requests],
            "requests_omitted": state.num_omitted,
            "blocks": cast("types.BlockState", state.blocks._asdict()),
            "last_step": step_document(state.steps[-1], state.started_s) if state.steps else None,
            "totals": {
                "steps": state.num_steps,
                "preemptions": stats.num_preemptions,
                "prefix_cache_queries": stats.prefix_cache_queries,
                "prefix_cache_hits": stats.prefix_cache_hits,
                "prompt_tokens": stats.prompt_tokens,
                "generation_tokens": generation_tokens,
            },
            "rates": self._rates(state, generation_tokens),
            "ttft_s": self._metrics.histogram("time_to_first_token_seconds"),
            "itl_s": self._metrics.histogram("inter_token_latency_seconds"),
        }

    def sample(self, state: InspectedEngine) -> bool:
        """Sample the counters, unless there is a recent sample; return whether there was one."""
        samples = self._samples
        has_recent = bool(samples) and state.uptime_s - samples[-1][0] <= _MAX_SAMPLE_AGE_S
        if not has_recent:
            self._rates(state, self._engine.stats().generation_tokens)
        return has_recent

    def _request(self, request: InspectedRequest) -> types.RequestState:
        fields = request._asdict()
        del fields["prompt_token_ids"]
        prompt = self._prompts.get(request.id)
        return cast(
            "types.RequestState", {**fields, "age_s": _round(request.age_s), "prompt": prompt}
        )

    def _decode_prompts(self, engine: Engine, requests: tuple[InspectedRequest, ...]) -> None:
        """Decode the prompts of new requests, and forget those of requests that have ended."""
        known, self._prompts = self._prompts, {}
        for request in requests:
            text = known.get(request.id)
            if text is None:
                token_ids = (request.prompt_token_ids or ())[:MAX_PROMPT_CHARACTERS]
                text = engine.tokenizer.decode(token_ids, skip_special_tokens=False)
            self._prompts[request.id] = text[:MAX_PROMPT_CHARACTERS]

    def _rates(self, state: InspectedEngine, generation_tokens: int) -> types.Rates:
        """Return the rates since the latest state that is at least _RATE_WINDOW_S old."""
        prompt_tokens = state.stats.prompt_tokens_computed
        sample = (state.uptime_s, generation_tokens, prompt_tokens, state.num_steps)
        samples = self._samples
        while samples and (
            state.uptime_s - samples[0][0] > _MAX_SAMPLE_AGE_S
            or (len(samples) > 1 and state.uptime_s - samples[1][0] >= _RATE_WINDOW_S)
        ):
            samples.popleft()
        first = samples[0] if samples else sample
        samples.append(sample)
        elapsed_s = sample[0] - first[0]
        tokens, prompts, steps = (
            round((now - before) / elapsed_s, 1) if elapsed_s > 0 else 0.0
            for now, before in zip(sample[1:], first[1:], strict=True)
        )
        return {"tokens_per_s": tokens, "prompt_tokens_per_s": prompts, "steps_per_s": steps}


def _sequence_document(sequence: StepSequence) -> types.StepSequence:
    request_id, choice, start, count, kind, drafted, accepted = sequence
    document: types.StepSequence = {
        "id": request_id, "choice": choice, "start": start, "count": count, "kind": kind,
    }  # fmt: skip
    if drafted:
        document |= {"drafted": drafted, "accepted": accepted}
    return document


def step_document(record: StepRecord, started_s: float) -> types.Step:
    """Return the document of a step; `started_s` is the start of the engine."""
    return {
        "step": record.step,
        "time_s": _round(record.started_s - started_s),
        "duration_s": _round(record.duration_s),
        "num_tokens": record.num_tokens,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_decode_tokens": record.num_decode_tokens,
        "sequences": [_sequence_document(sequence) for sequence in record.sequences],
        "admitted": list(record.events.admitted),
        "preempted": [
            {"id": preemption.request_id, "reason": preemption_reason(preemption)}
            for preemption in record.events.preempted
        ],
        "finished": [
            {"id": request_id, "reason": reason.value}
            for request_id, reason in record.events.finished
        ],
        "cache_hits": [
            {"id": request_id, "tokens": tokens} for request_id, tokens in record.events.cache_hits
        ],
        "num_copies": record.num_copies,
        "num_running": record.num_running,
        "num_waiting": record.num_waiting,
        "blocks": {
            "used": record.num_used_blocks,
            "cached": record.num_cached_blocks,
            "free": record.num_free_blocks,
        },
    }


def _config(engine: Engine, model_name: str) -> types.InspectorConfig:
    config, model, backend = engine.config, engine.model, engine.runner.backend
    return {
        "model": model_name,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
        "num_blocks": engine.blocks.num_blocks,
        "max_model_len": engine.max_model_len,
        "layers": model.layers,
        "heads": model.heads,
        "d_model": model.d_model,
        "vocab": model.vocab,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "kv_cache_dtype": backend.cache_dtype,
        "num_threads": backend.num_threads,
        "backend": engine.parts.name or config.backend,
        "parts": [
            {"part": owner.part, "is_readers": owner.is_readers} for owner in engine.parts.owners
        ],
    }


def _round(seconds: float) -> float:
    """Round to microseconds, which shortens the JSON."""
    return round(seconds, 6)
