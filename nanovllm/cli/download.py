"""`nanovllm download`: fetch a checkpoint from the Hugging Face hub into a folder."""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.cli.argument_types import print_message
from nanovllm.cli.environment import MODEL_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import add_model
from nanovllm.cli.parser import set_up
from nanovllm.config import BUNDLED_MODELS
from nanovllm.errors import NanovllmError, counted, printable

DEFAULT_MODEL = "gpt2"
_COMMAND = "nanovllm download"
_DESCRIPTION = (
    "Fetch a checkpoint from the Hugging Face hub: safetensors, tokenizer and config, never "
    "pickles. Run it again to resume an interrupted download."
)


def define(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    set_up(parser, run, "[MODEL] [options]", _DESCRIPTION, MODEL_VARIABLES)
    names = "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or any owner/name on the hub"
    add_model(parser, f"{names} (default: {DEFAULT_MODEL})", DEFAULT_MODEL)
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
    name: str = args.model
    if name in BUNDLED_MODELS:
        print_message(f"{name} is part of nanovllm and needs no download", _COMMAND)
        return 0
    output: Path = args.output or Path("models") / (name.rstrip("/").split("/")[-1] or name)
    with ended_by_interrupts():
        from nanovllm.hub import download, read_model_info

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
        f"  network     {counted(info['layers'], 'layer')}, {counted(info['heads'], 'head')}, "
        f"d_model {info['d_model']}"
    )
    print(f"  tokens      vocab {info['vocab']:,}, context {info['context_length']:,}")
    print(f"  size        {size_bytes / 1e6:,.1f} MB in {counted(len(files), 'file')}\n")
    print(f"Serve it with:  nanovllm serve {shlex.quote(str(output))}")
