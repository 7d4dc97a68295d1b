"""Load what an engine is made of: networks in the types of the settings, and the draft model."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.engine.memory import max_sampled_rows
from nanovllm.engine.scheduling.kv_cache_manager import KVCacheManager
from nanovllm.engine.speculation.cost_model import StepTimes
from nanovllm.engine.speculation.draft_model import DraftModel
from nanovllm.engine.speculation.speculator import Speculator
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import about_draft_model
from nanovllm.model.backend import Backend, LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import stored_dtype
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.runner.native_model_runner import NativeModelRunner


def with_stored_dtype(config: EngineConfig, folder: Path) -> EngineConfig:
    """Return the settings with the type that dtype="auto" stands for."""
    if config.dtype != "auto":
        return config
    is_numpy = config.backend == "numpy"  # supports float32 only
    return replace(config, dtype="float32" if is_numpy else stored_dtype(folder))


def load_options(config: EngineConfig) -> LoadOptions:
    """Return how a backend loads the model."""
    names = ("dtype", "quantization", "kv_cache_dtype", "batch_invariant", "num_threads")
    return LoadOptions(**{name: getattr(config, name) for name in names})


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Return the maximum tokens of a request; raises ValueError if the model supports fewer."""
    if config.max_model_len is None:
        return model.max_positions
    if config.max_model_len > model.max_positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model has only "
            f"{model.max_positions} positions; lower it or leave it out"
        )
    return config.max_model_len


def _draft_model(config: EngineConfig) -> tuple[EngineConfig, Path] | None:
    """Return the settings and the folder of the draft model; None without one."""
    speculative = config.speculation
    if speculative is None or speculative.model is None:
        return None
    quantization = speculative.quantization or (
        None if speculative.dtype is not None else config.quantization
    )
    settings = replace(
        config, dtype=speculative.dtype or config.dtype, quantization=quantization,
        speculative_config=None,
    )  # fmt: skip
    return settings, Path(speculative.model)


def check_draft_model(
    config: EngineConfig, model: ModelConfig, folder: Path
) -> tuple[EngineConfig, ModelConfig] | None:
    """Return the settings and the shape of the draft model of the model in `folder`; None without.

    This needs no weights. Raises CheckpointError if its folder is not valid, and ValueError unless
    it can draft for `model`.
    """
    found = _draft_model(config)
    if found is None:
        return None
    settings, name = found
    with about_draft_model():
        draft, vocabulary = load_config(name), Tokenizer.load(name).vocabulary
    if draft.vocab != model.vocab or vocabulary != Tokenizer.load(folder).vocabulary:
        raise ValueError(
            f"the draft model {name} has another vocabulary than the model ({draft.vocab:,} and "
            f"{model.vocab:,} tokens); choose one with the same tokenizer"
        )
    longest = max_model_len(config, model)
    if draft.max_positions < longest:
        raise ValueError(
            f"the draft model {name} has {draft.max_positions} positions, less than max_model_len "
            f"({longest}); lower max_model_len to {draft.max_positions}, or choose another draft "
            "model"
        )
    return settings, draft


def load_draft_model(config: EngineConfig, beside: Backend) -> NativeModelRunner | None:
    """Load the draft model, which `check_draft_model` has checked; None without one.

    It computes by turns with `beside`, the model.
    """
    found = _draft_model(config)
    if found is None:
        return None
    settings, folder = found
    with about_draft_model():
        settings = with_stored_dtype(settings, folder)
        options = replace(load_options(settings), beside=beside)
        return NativeModelRunner.load(folder, settings.backend, options)


def make_speculator(
    config: EngineConfig,
    runner: NativeModelRunner,
    draft: NativeModelRunner | None,
    kv_cache: KVCacheManager,
) -> Speculator | None:
    """Return what drafts tokens, after measuring steps; None if the settings do not ask for it.

    The measured steps write to the first blocks of the caches, which no request has used yet.
    """
    speculative = config.speculation
    if speculative is None:
        return None
    most = max_sampled_rows(config)
    times = StepTimes.measure(_timed_step(runner.backend), most)
    if draft is None:
        return Speculator(speculative, times, kv_cache.continuation)
    draft_times = StepTimes.measure(_timed_step(draft.backend), config.max_num_seqs)
    model = DraftModel(draft, config.block_size, config.max_num_batched_tokens)
    return Speculator(speculative, times, kv_cache.continuation, model, draft_times)


def _timed_step(backend: Backend) -> Callable[[int], float]:
    """Return a function that runs a step of a number of rows and returns its time in seconds."""

    def run(rows: int) -> float:
        zeros = np.zeros(rows, dtype=np.int64)
        numbers = np.arange(rows + 1, dtype=np.int64)
        batch = ForwardBatch(
            token_ids=zeros, positions=zeros, query_starts=numbers, context_lens=zeros + 1,
            block_tables=zeros[:, None], slots=zeros, logit_rows=numbers[:-1],
        )  # fmt: skip
        started_s = time.perf_counter()
        backend.greedy(backend.forward(batch))
        return time.perf_counter() - started_s

    return run
