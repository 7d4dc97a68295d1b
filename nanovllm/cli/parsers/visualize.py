"""The parsers of `nanovllm visualize attention|embeddings|logit-lens`."""

import argparse
from functools import partial
from pathlib import Path

from nanovllm.cli.argument_types import positive
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.options import add_model
from nanovllm.cli.parsers.parser import add_command

_DESCRIPTION = """
Draw the attention, the logit lens or the token embeddings of a model. The ending of --output
chooses the form: .html is an interactive page in a single file of at most 3 MB, .png and .svg are
static pictures, which need pip install matplotlib.
"""
_ATTENTION = """
Draw the attention weights of a prompt: which tokens each head reads. A .png or .svg shows one head
with the tokens as labels, or all chosen heads as a grid.

  nanovllm visualize attention --prompt "The old man said" --output attention.html
  nanovllm visualize attention gpt2 --prompt "..." --layers 5 --heads 1 --output head.svg
"""
_LENS = """
Draw the most probable next token after every layer, at every position of a prompt.

  nanovllm visualize logit-lens --prompt "The old man said to the" --output lens.png
"""
_EMBEDDINGS = """
Draw the embeddings of the tokens with the lowest ids, the most frequent ones, in two dimensions.

  nanovllm visualize embeddings --output tokens.html
  nanovllm visualize embeddings gpt2 --method tsne --limit 3000 --output tokens.png
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `visualize` and its three kinds."""
    parser = subparsers.add_parser(
        "visualize",
        help="draw attention, the logit lens or embeddings",
        usage="%(prog)s KIND [options]",
        description=_DESCRIPTION,
    )
    kinds = parser.add_subparsers(
        title="kinds", required=True, metavar="KIND", prog="nanovllm visualize"
    )
    add_kind = partial(
        add_command,
        kinds,
        arguments="[MODEL] --output FILE [options]",
        variables=MODEL_VARIABLES,
    )
    _add_attention(
        add_kind(
            "attention",
            "nanovllm.cli.visualize:run_attention",
            arguments="[MODEL] --prompt TEXT --output FILE [options]",
            summary="which tokens each head reads",
            description=_ATTENTION,
        )
    )
    _add_lens(
        add_kind(
            "logit-lens",
            "nanovllm.cli.visualize:run_lens",
            arguments="[MODEL] --prompt TEXT --output FILE [options]",
            summary="the prediction after every layer",
            description=_LENS,
        )
    )
    _add_embeddings(
        add_kind(
            "embeddings",
            "nanovllm.cli.visualize:run_embeddings",
            summary="token embeddings in two dimensions",
            description=_EMBEDDINGS,
        )
    )


def _add_attention(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, needs_prompt=True)
    for name in ("layers", "heads"):
        parser.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="LIST",
            help=f"{name} to draw, from 0, such as 0,3,5-7 (default: all)",
        )


def _add_lens(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, needs_prompt=True)
    parser.add_argument(
        "--top",
        type=positive,
        default=5,
        metavar="N",
        help="tokens of each prediction in an HTML file, at most 20",
    )


def _add_embeddings(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, needs_prompt=False)
    parser.add_argument(
        "--method",
        choices=("pca", "tsne"),
        default="pca",
        help="projection: principal components, or t-SNE, which needs scikit-learn",
    )
    parser.add_argument(
        "--limit", type=positive, default=2000, metavar="N", help="tokens to draw, 3 to 5000"
    )


def _add_common(parser: argparse.ArgumentParser, *, needs_prompt: bool) -> None:
    add_model(parser)
    parser.add_argument(
        "--prompt",
        required=needs_prompt,
        metavar="TEXT",
        help="text of at most 512 tokens"
        if needs_prompt
        else "text whose tokens are drawn and labelled too (default: none)",
    )
    parser.add_argument(
        "--output",
        type=_output,
        required=True,
        metavar="FILE",
        help="file to write: .html, .png or .svg; an existing one is replaced",
    )


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in {".html", ".png", ".svg"}:
        raise argparse.ArgumentTypeError(f"{text} must end with .html, .png or .svg")
    return path


def _numbers(text: str) -> list[int]:
    """Parse `0,3,5-7`."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends):
            raise argparse.ArgumentTypeError(f"{text} must be a list such as 0,3,5-7")
        numbers += range(int(ends[0]), int(ends[1]) + 1)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text} must be a list such as 0,3,5-7")
    return sorted(set(numbers))
