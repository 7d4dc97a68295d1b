"""Copy the best checkpoint of a run with its weights in float16.

Run: python scripts/bundled_model/convert.py RUN nanovllm/bundled/tiny-books
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

_COPIED = ("generation_config.json", "tokenizer_config.json")


def convert(run: Path, output: Path) -> int:
    """Write the checkpoint to `output`, and return its size in bytes.

    Raises:
        ValueError: a weight is not finite in float16.
    """
    tensors = {}
    for name, tensor in load_file(run / "model.safetensors").items():
        with np.errstate(over="ignore"):
            tensors[name] = tensor.astype(np.float16)
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
    parsed = parser.parse_args()
    print(f"{parsed.output}: {convert(parsed.run, parsed.output):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
