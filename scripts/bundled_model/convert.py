"""Copy the best checkpoint of a run with its weights in float16, on a coarse grid.

Run: python scripts/bundled_model/convert.py RUN nanovllm/bundled/tiny-books

Each row of a matrix keeps multiples of a power of two, at most 2**(bits - 1) - 1 of them to either
side of zero. The file is as large as any in float16 and loads everywhere, but a wheel, which is
compressed, needs less than half of the space for it. The matrices of the feed-forward networks,
which are more than half of the weights and bear it best, have one bit less.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

_COPIED = ("generation_config.json", "tokenizer_config.json")


def on_grid(matrix: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Return a matrix whose rows are rounded to multiples of a power of two.

    Of the two steps that fit a row, the one that reaches its largest element and its half, which
    clips, each row gets the one with the smaller squared error.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    exponent = np.ceil(np.log2(np.maximum(largest, np.finfo(np.float32).tiny) / top))
    rounded = []
    for lower in (0, 1):
        step = np.exp2(np.maximum(exponent - lower, -24))  # the smallest number of float16
        rounded.append(np.clip(np.round(matrix / step), -top, top) * step)
    errors = [np.square(each - matrix).sum(axis=1, keepdims=True) for each in rounded]
    best: npt.NDArray[np.float32] = np.where(errors[0] <= errors[1], *rounded).astype(np.float32)
    return best


def convert(run: Path, output: Path, bits: int) -> int:
    """Write the checkpoint to `output`, and return its size in bytes.

    Raises:
        ValueError: a weight is not finite in float16.
    """
    tensors = {}
    for name, tensor in load_file(run / "model.safetensors").items():
        with np.errstate(over="ignore"):
            kept = bits - 1 if ".mlp." in name else bits
            grid = on_grid(tensor, kept) if tensor.ndim == 2 else tensor
            tensors[name] = grid.astype(np.float16)
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} is not finite in float16")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that only we may read
    text = json.dumps({**config, "dtype": "float16"}, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
    for name in _COPIED:
        shutil.copyfile(run / name, output / name)
    Tokenizer.from_file(str(run / "tokenizer.json")).save(
        str(output / "tokenizer.json"), pretty=False
    )
    return sum(file.stat().st_size for file in output.iterdir())


def main() -> int:
    """Convert the run of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="output folder of nanovllm train")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--bits", type=int, choices=range(4, 12), default=6, help="of a weight (default: 6)"
    )
    parsed = parser.parse_args()
    print(f"{parsed.output}: {convert(parsed.run, parsed.output, parsed.bits):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
