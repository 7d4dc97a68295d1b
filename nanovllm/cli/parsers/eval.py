"""The parser of `nanovllm eval`."""

import argparse
from pathlib import Path

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import ENGINE_VARIABLES
from nanovllm.cli.options import add_model, add_precision_options
from nanovllm.cli.parsers.parser import add_command
from nanovllm.config import PRECISIONS

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


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `eval`."""
    parser = add_command(
        subparsers,
        "eval",
        "nanovllm.cli.eval:run",
        arguments="[MODEL] --data PATH... [options]",
        summary="measure loss, perplexity and bits per byte on text files",
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
