"""`nanovllm eval`: loss, perplexity and bits per byte of a checkpoint in one or several precisions.

nanovllm/evaluation defines the figures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.cli.argument_types import names_of
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import (
    PRECISION_OPTIONS,
    add_model,
    add_options,
    add_precision_options,
    add_texts,
    engine_config,
    options_of,
    read_data,
)
from nanovllm.cli.parser import set_up
from nanovllm.cli.table import finite_or_null, print_table
from nanovllm.config import PRECISIONS, EngineConfig, Positive
from nanovllm.errors import counted

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


_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.3f}"),
    ("bits per byte", "bits_per_byte", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("loss - float32", "loss_difference", "{:+.5f}"),
    ("top-1 = float32", "top1_agreement", "{:.2%}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
)
"""Columns of the table: title, figure and its form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The options with which texts are read and scored.

    Attributes:
        pattern: files to read in folders, recursively.
        max_tokens: maximum number of tokens to predict, over all files; None for all.
        add_bos_token: begin each file with the tokenizer's bos token, or the end-of-text token.
        context: maximum tokens that a prediction sees; None for the model's context.
        stride: tokens between the starts of windows, at most the context; None for the context.
    """

    pattern: str = "*.txt"
    max_tokens: Positive | None = None
    add_bos_token: bool = False
    context: Positive | None = None
    stride: Positive | None = None


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "[MODEL] --data PATH... [options]", _DESCRIPTION, ENGINE_VARIABLES)
    add_model(parser)
    add_texts(parser, EvalOptions, ("pattern", "max_tokens", "add_bos_token"))
    add_options(parser.add_argument_group("windows"), EvalOptions, ("context", "stride"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object (default: no)")
    output.add_argument(
        "--precision",
        type=names_of(PRECISIONS),
        metavar="LIST",
        help=f"{', '.join(PRECISIONS)}, several with commas, or all "
        "(default: that of --dtype and --quantization)",
    )
    add_precision_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Evaluate in every precision, and print a table or a JSON object."""
    with ended_by_interrupts():
        from nanovllm.evaluation import check_windows, evaluate
        from nanovllm.hub import resolve_model
    configs, options = _configs(parsed), options_of(parsed, EvalOptions)
    texts = read_data(parsed.data, options.pattern)
    folder = resolve_model(parsed.model)
    check_windows(folder, options.context, options.stride)
    how = {name: value for name, value in asdict(options).items() if name != "pattern"}
    types = [{name: getattr(config, name) for name in PRECISION_OPTIONS} for config in configs]
    results = [evaluate(folder, texts, **how, **one) for one in types]
    reference = next((result for result in results if result.precision == "float32"), None)
    rows = [_figures(result, reference) for result in results]
    if parsed.json:
        print(json.dumps(_record(parsed, options, results[0], rows), allow_nan=False))
    else:
        _print_report(parsed.model, results[0], rows)
    return 0


def _configs(parsed: argparse.Namespace) -> list[EngineConfig]:
    """Return the settings of each precision; raises ValueError for one that cannot be computed."""
    config = engine_config(parsed)
    if parsed.precision is None:
        return [config]
    if (config.dtype, config.quantization) != ("float32", None):
        raise ValueError(
            "--precision names the types of the weights; leave out --dtype and --quantization"
        )
    types: list[dict[str, Any]] = [
        {"quantization": name} if name == "int8" else {"dtype": name} for name in parsed.precision
    ]
    return [replace(config, **one) for one in types]


def _figures(result: EvaluationResult, reference: EvaluationResult | None) -> dict[str, Any]:
    """Return the figures of a precision; None for a comparison of float32 with itself."""
    other = None if result is reference else reference
    return {
        "precision": result.precision,
        "kv_cache_dtype": result.kv_cache_dtype,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "accuracy": result.accuracy,
        "loss_difference": None if other is None else result.loss - other.loss,
        "top1_agreement": None if other is None else result.top1_agreement(other),
        "duration_s": result.duration_s,
        "tokens_per_s": result.tokens_per_s,
    }


def _print_report(model: str, first: EvaluationResult, rows: list[dict[str, Any]]) -> None:
    print(
        f"{model}: {first.tokens:,} tokens of {first.bytes:,} bytes in "
        f"{counted(first.texts, 'text')}, context {first.context:,}, "
        f"stride {first.stride:,}, backend {first.backend}, "
        f"{counted(first.num_threads, 'thread')}\n"
    )
    table = [("precision", "KV cache", *(title for title, _, _ in _COLUMNS))]
    for row in rows:
        shown = ("-" if row[name] is None else form.format(row[name]) for _, name, form in _COLUMNS)
        table.append((row["precision"], row["kv_cache_dtype"], *shown))
    print_table(table)


def _record(
    parsed: argparse.Namespace,
    options: EvalOptions,
    first: EvaluationResult,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the report as one JSON object; a figure that is not finite is null."""
    return {
        "command": "eval",
        "model": parsed.model,
        "data": [str(path) for path in parsed.data],
        "texts": first.texts,
        "tokens": first.tokens,
        "bytes": first.bytes,
        "context": first.context,
        "stride": first.stride,
        "max_tokens": options.max_tokens,
        "add_bos_token": options.add_bos_token,
        "backend": first.backend,
        "num_threads": first.num_threads,
        "results": [finite_or_null(row) for row in rows],
    }
