"""`nanovllm eval`: loss, perplexity and bits per byte of a checkpoint in one or several precisions.

nanovllm/evaluation defines the figures.
"""

import argparse
import json
import math
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.table import print_table
from nanovllm.config import EngineConfig
from nanovllm.evaluation import EvaluationResult, check_windows, evaluate
from nanovllm.hub import resolve_model
from nanovllm.training.data.text import read_documents


def run(parsed: argparse.Namespace) -> int:
    """Evaluate in every precision, and print a table or a JSON object."""
    configs = _configs(parsed)
    corpus = read_documents(parsed.data, parsed.pattern)
    for warning in corpus.warnings:
        print_message(warning)
    texts = [document.text for document in corpus.documents]
    folder = resolve_model(parsed.model)
    check_windows(folder, parsed.context, parsed.stride)
    results = [
        evaluate(
            folder,
            texts,
            dtype=config.dtype,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            backend=config.backend,
            num_threads=config.num_threads,
            context=parsed.context,
            stride=parsed.stride,
            max_tokens=parsed.max_tokens,
            add_bos_token=parsed.add_bos_token,
        )
        for config in configs
    ]
    reference = next((result for result in results if result.precision == "float32"), None)
    if parsed.json:
        print(json.dumps(_record(parsed, results, reference), allow_nan=False))
    else:
        _print_report(parsed, results, reference)
    return 0


def _configs(parsed: argparse.Namespace) -> list[EngineConfig]:
    """Return the settings of each precision; raises ValueError for one that cannot be computed."""
    types = [(parsed.dtype, parsed.quantization)]
    if parsed.precision is not None:
        if types != [("float32", None)]:
            raise ValueError(
                "--precision names the types of the weights; leave out --dtype and --quantization"
            )
        types = [("float32", name) if name == "int8" else (name, None) for name in parsed.precision]
    return [
        EngineConfig(
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=parsed.kv_cache_dtype,
            backend=parsed.backend,
            num_threads=parsed.num_threads,
        )
        for dtype, quantization in types
    ]


def _print_report(
    parsed: argparse.Namespace,
    results: list[EvaluationResult],
    reference: EvaluationResult | None,
) -> None:
    first = results[0]
    print(
        f"{parsed.model}: {first.tokens:,} tokens of {first.bytes:,} bytes in "
        f"{first.texts:,} text{'s' * (first.texts != 1)}, context {first.context:,}, "
        f"stride {first.stride:,}, backend {first.backend}, {first.num_threads} "
        f"thread{'s' * (first.num_threads != 1)}\n"
    )
    header = ("precision", "KV cache", "loss", "perplexity", "bits per byte", "accuracy")
    rows = [(*header, "loss - float32", "top-1 = float32", "tokens/s")]
    for result in results:
        difference, agreement = _against(result, reference)
        rows.append(
            (
                result.precision,
                result.kv_cache_dtype,
                f"{result.loss:.4f}",
                f"{result.perplexity:,.3f}",
                f"{result.bits_per_byte:.4f}",
                f"{result.accuracy:.2%}",
                "-" if difference is None else f"{difference:+.5f}",
                "-" if agreement is None else f"{agreement:.2%}",
                f"{result.tokens_per_s:,.0f}",
            )
        )
    print_table(rows)


def _record(
    parsed: argparse.Namespace,
    results: list[EvaluationResult],
    reference: EvaluationResult | None,
) -> dict[str, Any]:
    """Return the report as one JSON object; a figure that is not finite is null."""
    first = results[0]
    return {
        "command": "eval",
        "model": parsed.model,
        "data": [str(path) for path in parsed.data],
        "texts": first.texts,
        "tokens": first.tokens,
        "bytes": first.bytes,
        "context": first.context,
        "stride": first.stride,
        "max_tokens": parsed.max_tokens,
        "add_bos_token": parsed.add_bos_token,
        "backend": first.backend,
        "num_threads": first.num_threads,
        "results": [_result_record(result, reference) for result in results],
    }


def _result_record(result: EvaluationResult, reference: EvaluationResult | None) -> dict[str, Any]:
    difference, agreement = _against(result, reference)
    figures = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "accuracy": result.accuracy,
        "loss_difference": difference,
        "top1_agreement": agreement,
        "duration_s": result.duration_s,
        "tokens_per_s": result.tokens_per_s,
    }
    return {
        "precision": result.precision,
        "kv_cache_dtype": result.kv_cache_dtype,
        **{
            name: value if value is not None and math.isfinite(value) else None
            for name, value in figures.items()
        },
    }


def _against(
    result: EvaluationResult, reference: EvaluationResult | None
) -> tuple[float | None, float | None]:
    """Return the loss minus float32's, and the fraction of equal most probable tokens."""
    if reference is None or result is reference:
        return None, None
    return result.loss - reference.loss, result.top1_agreement(reference)
