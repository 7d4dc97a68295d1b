"""The options of the benchmarks."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from nanovllm.config import Positive


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """The options of `bench latency`, without those of the engine.

    Attributes:
        model: folder or name.
        json: also write the JSON report to this file; None for none.
        input_len: tokens of each random prompt; None for 32, fewer in a shorter context.
        output_len: tokens to generate for each prompt; None for 128, fewer in a shorter context.
        batch_size: prompts in the batch.
        num_iters: measured iterations.
        num_iters_warmup: warm-up iterations before them.
        limits: measure memory bandwidth and peak FLOPS before and after, and report the fraction
            of them that was reached.
        temperature: 0 for greedy decoding.
    """

    model: str
    json: Path | None = None
    input_len: Positive | None = None
    output_len: Positive | None = None
    batch_size: Positive = 8
    num_iters: Positive = 10
    num_iters_warmup: Annotated[int, Interval(ge=0)] = 2
    limits: bool = True
    temperature: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    """The options of `bench throughput`, without those of the engine.

    Attributes:
        model: folder or name.
        json: also write the JSON report to this file; None for none.
        num_prompts: number of prompts; None for 32, or the whole dataset.
        input_len: tokens of each random prompt; None for 128, fewer in a shorter context.
        output_len: tokens to generate for each prompt, unless the dataset says; None for 64, fewer
            in a shorter context.
        dataset: JSON Lines file, {"prompt": ..., "max_tokens": ...}; None for random prompts.
        temperature: 0 for greedy decoding.
    """

    model: str
    json: Path | None = None
    num_prompts: Positive | None = None
    input_len: Positive | None = None
    output_len: Positive | None = None
    dataset: Path | None = None
    temperature: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsOptions:
    """The options of `bench threads`, without those of the engine.

    Attributes:
        model: folder or name.
        json: also write the JSON report to this file; None for none.
        max_threads: largest number of threads; None for the usable processors.
        input_len: tokens of the random prompt of each sequence; None for 128, fewer in a shorter
            context.
        output_len: tokens to generate for each prompt; None for 32, fewer in a shorter context.
        batch_size: prompts in the larger batch; the smaller one has a single prompt.
        num_iters: measured iterations of both batches for each number of threads.
    """

    model: str
    json: Path | None = None
    max_threads: Positive | None = None
    input_len: Positive | None = None
    output_len: Annotated[int, Interval(ge=2)] | None = None
    batch_size: Positive = 32
    num_iters: Positive = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """The options of `bench profile`, without those of the engine.

    Attributes:
        model: folder or name.
        json: also write the JSON report to this file; None for none.
        svg: draw the step of median duration to this file, a row for each thread; None for none.
        prefill: profile a step that computes prompts, instead of one that decodes.
        batch_size: sequences of the step; None for --max-num-seqs, or 1 with --prefill.
        input_len: tokens of each random prompt; None for 128, a whole step with --prefill, fewer in
            a shorter context.
        num_iters: measured steps.
        limits: measure memory bandwidth and peak FLOPS, and report the fractions of them.
    """

    model: str
    json: Path | None = None
    svg: Path | None = None
    prefill: bool = False
    batch_size: Positive | None = None
    input_len: Positive | None = None
    num_iters: Positive = 9
    limits: bool = True


OfflineOptions = LatencyOptions | ThroughputOptions | ThreadsOptions | ProfileOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options of `bench serve`.

    Attributes:
        model: name of the served model; None for the server's first.
        json: also write the JSON report to this file; None for none.
        base_url: address of the server.
        port: port of a server on this machine; None for that of --base-url.
        api_key: bearer token, visible to other users of the machine; None for NANOVLLM_API_KEY.
        timeout_s: timeout of a request in seconds.
        num_prompts: number of requests.
        random_input_len: tokens of each random prompt; None for 128, fewer in a shorter context.
        random_output_len: tokens to generate for each prompt; None for 64, fewer in a shorter
            context.
        request_rate: requests per second with Poisson arrivals; inf submits all at once.
        max_concurrency: maximum concurrent requests; None for no limit.
        ignore_eos: generate past the end-of-text token, so that all outputs have full length.
        temperature: 0 for greedy decoding.
        seed: seed of prompts and arrivals; None for random, which misses every prefix cache.
        vocab: draw prompt token ids below this; every byte-level vocabulary has 256.
    """

    model: str | None = None
    json: Path | None = None
    base_url: str = "http://127.0.0.1:8000"
    port: Annotated[int, Interval(ge=0, le=65535)] | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: Annotated[float, Interval(gt=0)] = 600.0
    num_prompts: Positive = 32
    random_input_len: Positive | None = None
    random_output_len: Positive | None = None
    request_rate: Annotated[float, Interval(gt=0)] = math.inf
    max_concurrency: Positive | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: Annotated[int, Interval(ge=0)] | None = None
    vocab: Positive = 256
