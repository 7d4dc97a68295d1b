"""`nanovllm ablate`: what each head, sublayer and block contributes to the loss of a model.

nanovllm/evaluation/ablation.py defines the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanovllm.cli.argument_types import names_of, output_file
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
from nanovllm.config import Positive
from nanovllm.errors import counted

if TYPE_CHECKING:
    from nanovllm.evaluation import AblatedLoss, AblationResult

_DESCRIPTION = """
Measure the loss of a model (nats per token) on text files, whole and without each of its parts in
turn: each attention head, each attention and feed-forward sublayer, each block. A part without
which the loss rises much is one that the model needs for this text.

A head is switched off by zeros in its rows of the output projection, a sublayer by zeros in its
last projection and bias, so that it adds nothing to the residual stream. The loss is that of
`nanovllm eval`.

  nanovllm ablate --data book.txt
  nanovllm ablate gpt2 --data book.txt --parts head --max-tokens 512 --output heads.html
"""
_KINDS = ("head", "attention", "ffn", "block")
_NAMES = {"attention": "attention", "ffn": "feed-forward", "block": "block"}
_SHADES = " .:-=+*#"
_ENDINGS = (".html", ".svg", ".png", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateOptions:
    """The options with which texts are read and scored, and the table is printed.

    Attributes:
        pattern: files to read in folders, recursively.
        max_tokens: maximum number of tokens to predict, over all files.
        context: maximum tokens that a prediction sees; None for the model's context.
        sort: order of the table. By "change" the most important part is the first.
    """

    pattern: str = "*.txt"
    max_tokens: Positive = 2048
    context: Positive | None = None
    sort: Literal["change", "layer"] = "change"


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "[MODEL] --data PATH... [options]", _DESCRIPTION, ENGINE_VARIABLES)
    add_model(parser)
    parser.add_argument(
        "--parts",
        type=names_of(_KINDS),
        default="all",
        metavar="LIST",
        help=f"parts to switch off: {', '.join(_KINDS)}, several with commas, or all",
    )
    add_texts(parser, AblateOptions, ("pattern", "max_tokens", "context"))
    output = parser.add_argument_group("output")
    add_options(output, AblateOptions, ("sort",))
    output.add_argument(
        "--output",
        type=output_file(*_ENDINGS),
        metavar="FILE",
        help=f"heat map ({', '.join(_ENDINGS[:3])}) or figures (.json) to write beside the table; "
        "an existing file is replaced (default: none)",
    )
    add_precision_options(parser)


def run(parsed: argparse.Namespace) -> int:
    """Measure, print a map and a table, and write the file."""
    with ended_by_interrupts():
        from nanovllm.cli import drawing
        from nanovllm.evaluation import ablate
    config, options = engine_config(parsed), options_of(parsed, AblateOptions)
    if parsed.output is not None:
        drawing.check_output(parsed.output)
    result = ablate(
        parsed.model,
        read_data(parsed.data, options.pattern),
        kinds=parsed.parts,
        context=options.context,
        max_tokens=options.max_tokens,
        **{name: getattr(config, name) for name in PRECISION_OPTIONS},
    )
    if parsed.output is not None:
        _write(parsed, result)
    _print_report(parsed.model, options, result)
    return 0 if parsed.output is None else drawing.report_file(parsed.output)


def _write(parsed: argparse.Namespace, result: AblationResult) -> None:
    """Write the heat map or the figures."""
    from nanovllm.cli import drawing

    if parsed.output.suffix.lower() == ".json":
        text = json.dumps(_record(parsed, result), allow_nan=False)
        parsed.output.write_text(text + "\n", encoding="utf-8")
    else:
        drawing.draw_ablation(parsed.model, result, parsed.output)


def _print_report(model: str, options: AblateOptions, result: AblationResult) -> None:
    print(
        f"{model}: {result.tokens:,} tokens of {result.bytes:,} bytes in "
        f"{counted(result.texts, 'text')}, context {result.context:,}\n"
        f"whole model: {result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte\n"
        "\nRise of the loss without each part; ## is the largest. Heads have their own scale:\n"
    )
    print_table([*_map(result)])
    print()
    ordered = list(result.parts)
    if options.sort == "change":
        ordered.sort(key=lambda each: -each.change)
    print_table(
        [("without", "loss", "change", "standard error", "bits per byte"), *map(_row, ordered)]
    )


def _row(each: AblatedLoss) -> tuple[str, ...]:
    part = each.part
    name = f"head {part.head}" if part.head is not None else _NAMES[part.kind]
    return (
        f"layer {part.layer} {name}",
        f"{each.loss:.4f}",
        f"{each.change:+.4f}",
        f"{each.standard_error:.4f}",
        f"{each.bits_per_byte:.4f}",
    )


def _map(result: AblationResult) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the heat map: a column for each head, then the sublayers and the block.

    A shade follows the square root of a rise, so that small ones remain visible.
    """
    largest = {
        is_head: max(
            [each.change for each in result.parts if (each.part.head is not None) is is_head],
            default=0.0,
        )
        for is_head in (True, False)
    }
    cells: dict[int, dict[str, str]] = {layer: {} for layer in range(result.model.layers)}
    for each in result.parts:
        is_head = each.part.head is not None
        column = str(each.part.head) if is_head else _NAMES[each.part.kind]
        share = each.change / largest[is_head] if each.change > 0 else 0.0
        cells[each.part.layer][column] = 2 * _SHADES[round(share**0.5 * (len(_SHADES) - 1))]
    yield ("layer \\ head", *(f"{name:2}" for name in cells[0]))
    for layer, row in cells.items():
        yield (str(layer), *row.values())


def _record(parsed: argparse.Namespace, result: AblationResult) -> dict[str, Any]:
    """Return the report as one JSON object; a figure that is not finite is null."""
    figures = asdict(result)
    del figures["model"]
    parts = [{**each.pop("part"), **each} for each in figures.pop("parts")]
    return {
        "command": "ablate",
        "model": parsed.model,
        "data": [str(path) for path in parsed.data],
        **finite_or_null(figures),
        "parts": [finite_or_null(part) for part in parts],
    }
