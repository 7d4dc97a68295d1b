"""`nanovllm eval`: loss, perplexity and bits per byte of a checkpoint in one or several precisions.

nanovllm/evaluation defines the figures.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.cli.argument_types import positive, print_message
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import add_model, add_precision_options
from nanovllm.cli.parser import set_up
from nanovllm.cli.table import print_table
from nanovllm.config import PRECISIONS, EngineConfig

if TYPE_CHECKING:
    from nanovllm.evaluation import EvaluationResult

_DESCRIPTION = """
Measure the loss (nats per token), perplexity and bits per byte of a checkpoint on text files, in
one or several precisions.

Each file is scored on its own. Every token but a file's first is predicted once, from at most
--context tokens before it. Without --stride, windows do not overlap: the first prediction of a
window sees one token. With --stride N, each prediction after the first window sees at least context
- N + 1 tokens, as in Hugging Face's guide to perplexity; this takes context / N times as long.

  nanovllm eval gpt2 --data book.txt --precision all
  nanovllm eval ./my-model --data src --pattern '*.py' --quantization int8 --json
"""


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(
        parser,
        run,
        arguments="[MODEL] --data PATH... [options]",
        description=_DESCRIPTION,
        variables=ENGINE_VARIABLES,
    )
    add_model(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="text files in UTF-8, and folders of them",
    )
    text.add_argument(
        "--pattern", default="*.txt", metavar="GLOB", help="files to read in folders, recursively"
    )
    text.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="maximum number of tokens to predict, over all files (default: all)",
    )
    text.add_argument(
        "--add-bos-token",
        action="store_true",
        help="begin each file with the end-of-text token, so that all its tokens are predicted "
        "(default: no)",
    )
    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="maximum tokens that a prediction sees (default: the model's context)",
    )
    windows.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens between the starts of windows, at most the context (default: the context)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object (default: no)")
    output.add_argument(
        "--precision",
        type=_precisions,
        metavar="LIST",
        help=f"{', '.join(PRECISIONS)}, several with commas, or all "
        "(default: that of --dtype and --quantization)",
    )
    add_precision_options(parser)


def _precisions(text: str) -> list[str]:
    names = PRECISIONS if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} must be {', '.join(PRECISIONS)} or all")
    return list(dict.fromkeys(names))


def run(parsed: argparse.Namespace) -> int:
    """Evaluate in every precision, and print a table or a JSON object."""
    with ended_by_interrupts():
        from nanovllm.evaluation import check_windows, evaluate
        from nanovllm.hub import resolve_model
        from nanovllm.training.data.text import read_documents
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
