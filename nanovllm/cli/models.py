"""`nanovllm list`, `show` and `remove`: models and compiled kernels on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.cli.environment import ENGINE_VARIABLES, MODEL_VARIABLES
from nanovllm.cli.interrupts import ended_by_interrupts
from nanovllm.cli.options import add_model
from nanovllm.cli.parser import set_up
from nanovllm.cli.table import print_rows, print_table
from nanovllm.config import DRAFT_MODEL, format_bytes
from nanovllm.errors import CheckpointError, ModelNotFoundError, printable
from nanovllm.model.families.registry import load_config

if TYPE_CHECKING:
    from nanovllm.hub.inventory import StoredItem

_LIST = """
List the models and the compiled kernels on this machine: the bundled model, the smaller draft
model beside it (for speculative decoding), downloads below ./models, models in the Hugging Face
cache that can be loaded, and the kernels.
"""
_SHOW = """
Show a model on this machine: its configuration, files and folder. `show kernels` lists the kernels.
"""
_REMOVE = """
Remove models from the Hugging Face cache, or the compiled kernels ("kernels"), after a question.
Nothing outside of these two folders is removed.
"""


def define_list(parser: argparse.ArgumentParser) -> None:
    """Define the options of `list`, which has none."""
    set_up(parser, run_list, "", _LIST, ENGINE_VARIABLES)


def define_show(parser: argparse.ArgumentParser) -> None:
    """Define the options of `show`."""
    set_up(parser, run_show, "[MODEL]", _SHOW, ENGINE_VARIABLES)
    add_model(parser)


def define_remove(parser: argparse.ArgumentParser) -> None:
    """Define the options of `remove`."""
    variables = ("NANOVLLM_CACHE_DIR", *MODEL_VARIABLES[:2])
    set_up(parser, run_remove, "NAME... [--yes]", _REMOVE, variables)
    parser.add_argument("names", nargs="+", metavar="NAME", help="name as in `nanovllm list`")
    parser.add_argument(
        "-y", "--yes", action="store_true", help="remove without asking (default: ask)"
    )


def run_list(parsed: argparse.Namespace) -> int:
    """Print a table of the models and kernels."""
    with ended_by_interrupts():
        from nanovllm.hub.inventory import stored_items
    rows = [("NAME", "KIND", "SIZE", "CHANGED", "FOLDER")]
    rows += [
        (
            printable(item.name),
            "bundled draft" if item.name == DRAFT_MODEL else item.kind,
            format_bytes(item.size_bytes),
            _date(item.modified_s),
            str(item.folder),
        )
        for item in stored_items()
    ]
    print_table(rows)
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Print a model's configuration and files, or the compiled kernels."""
    with ended_by_interrupts():
        from nanovllm.hub import read_model_info, resolve_model
        from nanovllm.hub.inventory import KERNELS, kernel_files
        from nanovllm.model.config import load_generation_config
        from nanovllm.sampling_params import MODEL_DEFAULTS
    if parsed.model == KERNELS and not Path(KERNELS).exists():
        _print_files(kernel_files())
        return 0
    folder = resolve_model(parsed.model, may_fetch=False)
    config = load_config(folder)
    info = read_model_info(folder)
    defaults = load_generation_config(folder)
    rows = {
        "folder": str(folder),
        "repository": f"{info['repo']}, revision {str(info.get('revision'))[:12]}" if info else "",
        "parameters": f"{config.num_parameters:,}",
        "layers": f"{config.layers:,}",
        "hidden size": f"{config.d_model:,}",
        "heads": f"{config.heads:,} of {config.head_dim}",
        "vocabulary": f"{config.vocab:,} tokens",
        "context": f"{config.max_positions:,} tokens",
        "chat template": _chat_template(folder),
        "sampling": ", ".join(
            f"{name} {defaults[name]}" for name in MODEL_DEFAULTS if defaults.get(name) is not None
        ),
    }
    print(printable(str(parsed.model)))
    print_rows({label: printable(value, 500) for label, value in rows.items()}, 14, "  ")
    print()
    _print_files(sorted(path for path in folder.iterdir() if path.is_file()))
    return 0


def run_remove(parsed: argparse.Namespace) -> int:
    """Remove models or kernels, after a question without --yes; return 1 if one was kept."""
    with ended_by_interrupts():
        from nanovllm.hub.inventory import check_removable, remove_item, stored_items
    items = stored_items()
    chosen = [_find(name, items) for name in dict.fromkeys(parsed.names)]
    for item in chosen:
        check_removable(item)
    kept = 0
    for item in chosen:
        shown = f"{printable(item.name)} ({format_bytes(item.size_bytes)}) in {item.folder}"
        if not parsed.yes and not _confirm(f"Remove {shown}?"):
            print(f"kept {shown}")
            kept += 1
            continue
        remove_item(item)
        print(f"removed {shown}")
    return 1 if kept else 0


def _find(name: str, items: Sequence[StoredItem]) -> StoredItem:
    from nanovllm.hub.downloads import full_name

    for item in items:
        if item.name in (name, full_name(name), f"./{name}"):
            return item
    names = ", ".join(printable(item.name) for item in items)
    raise ModelNotFoundError(f"there is no {name} to remove; there are {names}")


def _confirm(question: str) -> bool:
    """Ask on the terminal; raises ValueError without one."""
    if not sys.stdin.isatty():
        raise ValueError(f"{question} There is no terminal to ask on; give --yes")
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _chat_template(folder: Path) -> str:
    """Return "yes" or "no", or why the files of a model folder cannot be read."""
    from nanovllm.engine.chat.template import ChatTemplate

    try:
        return "no" if ChatTemplate.load(folder) is None else "yes"
    except CheckpointError as error:
        return str(error)


def _print_files(files: Iterable[Path]) -> None:
    rows = [("FILE", "SIZE", "CHANGED")]
    for path in files:
        status = path.stat()
        rows.append((printable(path.name), format_bytes(status.st_size), _date(status.st_mtime)))
    print_table(rows)


def _date(time_s: float | None) -> str:
    """Return a time in the local time zone."""
    if time_s is None:
        return "-"
    return datetime.fromtimestamp(time_s).astimezone().strftime("%Y-%m-%d %H:%M")
