"""`nanovllm download`: fetch a GPT-2 checkpoint from the Hugging Face hub into a folder."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.parsers.parser import add_command
from nanovllm.config import BUNDLED_MODELS
from nanovllm.errors import NanovllmError, printable

DEFAULT_MODEL = "gpt2"
_COMMAND = "nanovllm download"
DESCRIPTION = (
    "Fetch a GPT-2 checkpoint from the Hugging Face hub: safetensors, tokenizer and config, never "
    "pickles. Run it again to resume an interrupted download."
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `download` to the subcommands of `nanovllm`."""
    parser = add_command(
        subparsers,
        "download",
        "nanovllm.cli.download:run",
        arguments="[MODEL] [options]",
        summary="fetch a model from the Hugging Face hub",
        description=DESCRIPTION,
        variables=MODEL_VARIABLES,
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, shared with scripts/download_gpt2.py."""
    names = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or any owner/name on the hub"
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help=f"{names} (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--model", metavar="MODEL", help="the same, as a flag")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="destination folder (default: ./models/<last part of the name>)",
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument(
        "--token",
        help="access token for gated and private models, visible to other users of the machine "
        "(default: HF_TOKEN)",
    )


def run(args: argparse.Namespace) -> int:
    """Download and print a summary; return the exit code."""
    if args.name and args.model and args.name != args.model:
        print_message(
            f"two models are named, {args.name} and --model {args.model}; name one", _COMMAND
        )
        return 2
    name: str = args.model or args.name or DEFAULT_MODEL
    if name in BUNDLED_MODELS:
        print_message(f"{name} is part of nanovllm and needs no download", _COMMAND)
        return 0
    output: Path = args.output or Path("models") / (name.rstrip("/").split("/")[-1] or name)
    from nanovllm.hub import download, read_model_info  # noqa: PLC0415 - slow to import

    print(f"Downloading {name} to {output}", flush=True)
    try:
        download(name, output, revision=args.revision, token=args.token)
        _print_summary(output, read_model_info(output))
    except NanovllmError as error:
        print_message(str(error), _COMMAND)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        print_message("interrupted; run the same command again to resume", _COMMAND)
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
