"""Write a checkpoint several times as wide that computes the same function as a GPT-2 checkpoint.

Run: python benchmarks/widen.py tiny-books 4 models/tiny-books-x4

It has the text quality of the original at the cost of a larger model. The widening preserves the
function (Net2Net, Chen et al. 2015, arXiv:1511.05641): the hidden vector, the attention heads and
the feed-forward units are repeated, and weights that read repeated inputs are divided by the
factor. The weights are stored in float32. head_dim stays.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.cli.argument_types import positive
from nanovllm.errors import NanovllmError
from nanovllm.hub import resolve_model
from nanovllm.model.checkpoint import load_arrays
from nanovllm.model.config import read_json
from nanovllm.model.families.registry import load_config

_NOT_COPIED = ("*.safetensors*", "*.bin", "*.h5", "*.msgpack", ".*", "README.md")
"""Weights of the original, and what describes it."""


def widen(model: str | os.PathLike[str], factor: int, output: Path) -> Path:
    """Write a model, by folder or name, `factor` times as wide to the new folder `output`.

    Raises:
        ValueError: the factor is below 1.
        FileExistsError: `output` exists.
        NanovllmError: there is no such model, or it cannot be loaded.
    """
    if factor < 1:
        raise ValueError(f"the factor is {factor} but must be at least 1")
    if output.exists():
        raise FileExistsError(f"{output} exists; give a new folder, or remove it first")
    folder = resolve_model(model)
    config = load_config(folder)
    raw = read_json(folder / "config.json")
    raw |= {name: factor * raw[name] for name in ("n_embd", "n_head")} | {"dtype": "float32"}
    raw.pop("torch_dtype", None)
    if raw.get("n_inner") is not None:
        raw["n_inner"] *= factor
    tensors = {
        f"transformer.{name}" if name != "lm_head.weight" else name: _widen(name, array, factor)
        for name, array in load_arrays(folder, config).items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        part = Path(temporary) / "model"
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        part.rename(output)
    return output


def _widen(name: str, array: np.ndarray, factor: int) -> np.ndarray:
    """Return a tensor of the wide network."""
    if "c_attn." in name:
        # Query, key and value have their own repeated heads.
        parts = [_repeat(part, factor) for part in np.split(array, 3, axis=-1)]
        return np.concatenate(parts, axis=-1)
    wide = np.tile(array, factor) if _is_table(name) else _repeat(array, factor)
    # The head sums over the repeated final hidden vector, so that vector is divided.
    return wide / np.float32(factor) if name.startswith("ln_f.") else wide


def _is_table(name: str) -> bool:
    """Whether the rows of a matrix are tokens or positions."""
    return name in ("wte.weight", "wpe.weight", "lm_head.weight")


def _repeat(array: np.ndarray, factor: int) -> np.ndarray:
    """Return a vector repeated, or a matrix [inputs, outputs] that reads and writes repeated ones.

    A matrix is divided by the factor, because it sums over equal inputs.
    """
    if array.ndim == 1:
        return np.tile(array, factor)
    return np.tile(array / np.float32(factor), (factor, factor))


def main(arguments: Sequence[str] | None = None) -> int:
    """Widen the model of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or name of a model")
    parser.add_argument("factor", type=positive, help="width of the new model in old widths")
    parser.add_argument("output", type=Path, help="new folder")
    parsed = parser.parse_args(arguments)
    try:
        print(widen(parsed.model, parsed.factor, parsed.output))
    except (NanovllmError, FileExistsError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
