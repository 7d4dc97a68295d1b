"""`nanovllm visualize`: draw attention, the logit lens or token embeddings to a file."""

import argparse

from nanovllm.cli.argument_types import output_file, positive
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.options import add_model
from nanovllm.cli.parser import add_commands, imported, set_up

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


def define(parser: argparse.ArgumentParser) -> None:
    """Define the three kinds."""
    parser.usage = "%(prog)s KIND [options]"
    parser.description = _DESCRIPTION
    kinds = {
        "attention": ("which tokens each head reads", _define_attention),
        "logit-lens": ("the prediction after every layer", _define_lens),
        "embeddings": ("token embeddings in two dimensions", _define_embeddings),
    }
    add_commands(parser, "kind", kinds)


def _define_attention(parser: argparse.ArgumentParser) -> None:
    _define_common(parser, "run_attention", _ATTENTION, needs_prompt=True)
    for name in ("layers", "heads"):
        parser.add_argument(
            f"--{name}",
            type=_numbers,
            metavar="LIST",
            help=f"{name} to draw, from 0, such as 0,3,5-7 (default: all)",
        )


def _define_lens(parser: argparse.ArgumentParser) -> None:
    _define_common(parser, "run_lens", _LENS, needs_prompt=True)
    parser.add_argument(
        "--top",
        type=positive,
        default=5,
        metavar="N",
        help="tokens of each prediction in an HTML file, at most 20",
    )


def _define_embeddings(parser: argparse.ArgumentParser) -> None:
    _define_common(parser, "run_embeddings", _EMBEDDINGS, needs_prompt=False)
    parser.add_argument(
        "--method",
        choices=("pca", "tsne"),
        default="pca",
        help="projection: principal components, or t-SNE, which needs scikit-learn",
    )
    parser.add_argument(
        "--limit", type=positive, default=2000, metavar="N", help="tokens to draw, 3 to 5000"
    )


def _define_common(
    parser: argparse.ArgumentParser, function: str, description: str, *, needs_prompt: bool
) -> None:
    """Describe a kind that `function` draws, and add the options of all kinds."""
    set_up(
        parser,
        imported(f"nanovllm.cli.drawing:{function}"),
        f"[MODEL] {'--prompt TEXT ' * needs_prompt}--output FILE [options]",
        description,
        MODEL_VARIABLES,
    )
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
        type=output_file(".html", ".png", ".svg"),
        required=True,
        metavar="FILE",
        help="file to write: .html, .png or .svg; an existing one is replaced",
    )


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
