"""`nanovllm download`: fetch a GPT-2 from the Hugging Face hub into a folder, so that it can be served without network."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import printable_lines
from nanovllm.cli.environment import MODEL_VARIABLES, variables_help
from nanovllm.cli.parsers.parser import Command
from nanovllm.errors import NanovllmError, printable

DEFAULT_MODEL = "gpt2"
DESCRIPTION = (
    "Fetch a GPT-2 checkpoint from the Hugging Face hub: safetensors, tokenizer and config, never pickles. "
    "Run it again to continue an interrupted download."
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `download` to the subcommands of `nanovllm`."""
    parser = subparsers.add_parser(
        "download",
        help="fetch a model from the Hugging Face hub",
        usage="%(prog)s [MODEL] [options]",
        description=DESCRIPTION,
        epilog=variables_help(*MODEL_VARIABLES),
    )
    add_arguments(parser)
    parser.set_defaults(run=Command("nanovllm.cli.download:run"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, shared with scripts/download_gpt2.py."""
    names = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or any owner/name on the hub"
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help=f"{names} (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--model", metavar="MODEL", help="the same, as a flag")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to put it (default: ./models/<last part of the name>)",
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--token",
        help="for gated and private models (default: HF_TOKEN, which other users of the machine cannot see)",
    )


def run(args: argparse.Namespace) -> int:
    """Download and say what is there; returns the exit code: 0, 1 after an error that it has told, 130 after Ctrl-C."""
    if args.name and args.model and args.name != args.model:
        print(
            f"nanovllm download: two models are named, {args.name} and --model {args.model}; name one",
            file=sys.stderr,
        )
        return 2
    name: str = args.model or args.name or DEFAULT_MODEL
    output: Path = args.output or Path("models") / (name.rstrip("/").split("/")[-1] or name)
    from nanovllm.hub import download, read_model_info  # noqa: PLC0415 - slow to import

    print(f"Downloading {name} to {output}", flush=True)
    try:
        download(name, output, revision=args.revision, token=args.token)
        _print_summary(output, read_model_info(output))
    except NanovllmError as error:
        print(f"nanovllm download: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nnanovllm download: interrupted; the same command goes on where it stopped",
            file=sys.stderr,
        )
        return 130
    return 0


def _print_summary(output: Path, info: Mapping[str, Any]) -> None:
    files = info["files"]
    size_bytes = sum(file["size_bytes"] for file in files.values())
    print(f"\n{printable(str(info['repo']))}, revision {printable(str(info['revision'])[:12])}")
    print(f"  parameters  {info['parameters']:,}")
    print(
        f"  network     {info['layers']} layers, {info['heads']} heads, d_model {info['d_model']}"
    )
    print(f"  tokens      vocab {info['vocab']:,}, context {info['context_length']:,}")
    print(f"  size        {size_bytes / 1e6:,.1f} MB in {len(files)} files\n")
    print(f"Serve it with:  nanovllm serve {shlex.quote(str(output))}")
