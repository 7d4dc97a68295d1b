"""Safetensors checkpoints in Hugging Face's GPT-2 format, read strictly.

The safetensors library checks the file (header, offsets, size); the arrays are then mapped from it without a copy, which the
library's NumPy interface cannot do, nor read BF16. Names come with or without the `transformer.` prefix, in one file or in shards
listed by model.safetensors.index.json. Whatever is missing, left over or of the wrong shape is collected into one error.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.config import GPT2Config, read_json
from nanovllm.model.weights import (
    AttentionWeights,
    FeedForwardWeights,
    GPT2Weights,
    Layer,
    LayerNorm,
    Linear,
)

_PREFIX = "transformer."
_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)"
)  # causal masks that older checkpoints store
_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NAME_CHARACTERS = 100
_TOUCH_BYTES = 16 << 20  # how much of a mapped file is read between two moves of the progress bar


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor where it lies in the file: `raw` is a memory map, BF16 as its 16-bit patterns."""

    raw: np.ndarray
    dtype: str
    file: str


def load_weights(folder: Path, config: GPT2Config) -> GPT2Weights:
    """The folder's weights in float32; what is stored as float32 stays mapped from the file, unless it lies there at an odd address.

    Raises:
        CheckpointError: no safetensors, a damaged file, or tensors missing, left over, of the wrong shape or type.
    """
    stored = read_tensors(folder)
    shapes = expected_shapes(config)
    _check_tensors(stored, shapes, tied_head=config.tied_head, folder=folder)
    total = sum(stored[name].raw.nbytes for name in shapes)
    progress: tqdm[Any]
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=None, leave=False
    ) as progress:
        arrays = {name: _to_float32(stored[name], progress) for name in shapes}
    return build_tree(arrays, config)


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by its name without the prefix, as stored; causal-mask buffers left out."""
    found: dict[str, StoredTensor] = {}
    for path in _checkpoint_files(folder):
        for name, tensor in _map_file(path):
            short = name.removeprefix(_PREFIX)
            if short in found:
                raise CheckpointError(
                    f"{folder}: {printable(short)} is there twice, in {found[short].file} and in {tensor.file}"
                )
            if not _BUFFERS.fullmatch(short):
                found[short] = tensor
    return found


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must have."""
    d_model, d_ff = config.d_model, config.d_ff
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab, d_model),
        "wpe.weight": (config.max_positions, d_model),
    }
    for layer in range(config.layers):
        linears = {
            "attn.c_attn": (d_model, 3 * d_model),
            "attn.c_proj": (d_model, d_model),
            "mlp.c_fc": (d_model, d_ff),
            "mlp.c_proj": (d_ff, d_model),
        }
        for name, (rows, columns) in linears.items():
            shapes |= {
                f"h.{layer}.{name}.weight": (rows, columns),
                f"h.{layer}.{name}.bias": (columns,),
            }
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (d_model,), f"h.{layer}.{name}.bias": (d_model,)}
    shapes |= {"ln_f.weight": (d_model,), "ln_f.bias": (d_model,)}
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab, d_model)
    return shapes


def build_tree(arrays: dict[str, Float32[np.ndarray, "..."]], config: GPT2Config) -> GPT2Weights:
    """The arrays of `expected_shapes` as the tree that the forward pass walks."""

    def linear(name: str) -> Linear:
        return Linear(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    def norm(name: str) -> LayerNorm:
        return LayerNorm(arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    layers = tuple(
        Layer(
            attention_norm=norm(f"h.{i}.ln_1"),
            attention=AttentionWeights(linear(f"h.{i}.attn.c_attn"), linear(f"h.{i}.attn.c_proj")),
            ffn_norm=norm(f"h.{i}.ln_2"),
            ffn=FeedForwardWeights(linear(f"h.{i}.mlp.c_fc"), linear(f"h.{i}.mlp.c_proj")),
        )
        for i in range(config.layers)
    )
    head = arrays["wte.weight"] if config.tied_head else arrays["lm_head.weight"]
    return GPT2Weights(arrays["wte.weight"], arrays["wpe.weight"], layers, norm("ln_f"), head)


def _checkpoint_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        others = [
            printable(path.name, _NAME_CHARACTERS)
            for kind in ("*.bin", "*.h5")
            for path in sorted(folder.glob(kind))
        ]
        hint = (
            f"; it has {', '.join(others)}, which must be converted to safetensors first"
            if others
            else ""
        )
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}"
        )
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    outside = [
        printable(name, _NAME_CHARACTERS)
        for name in names
        if name != Path(name).name or "\\" in name
    ]
    if outside:
        raise CheckpointError(
            f"{index} names files outside its own folder: {', '.join(outside[:5])}"
        )
    missing = [printable(name, _NAME_CHARACTERS) for name in names if not _is_file(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that {index.name} lists: {', '.join(missing[:5])}"
        )
    return [folder / name for name in names]


def _is_lfs_pointer(path: Path) -> bool:
    """Whether it is the text that `git clone` without Git LFS leaves in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _is_file(path: Path) -> bool:
    """Whether it is a file; the name may be one that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _map_file(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks the header, every offset and the file's size
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder, "
                "or fetch the model by `nanovllm download`"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or incomplete ({path.stat().st_size} bytes): {printable(str(error))}; fetch it again"
        ) from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        dtype = _STORED_DTYPES.get(
            entry["dtype"], np.dtype(np.uint8)
        )  # another type is reported by name, with the other problems
        shape = tuple(entry["shape"]) if entry["dtype"] in _STORED_DTYPES else (stop - start,)
        empty = math.prod(shape) == 0
        raw = (
            np.empty(shape, dtype=dtype)
            if empty
            else np.memmap(
                path, dtype=dtype, mode="r", offset=8 + header_bytes + start, shape=shape
            )
        )
        yield name, StoredTensor(np.asarray(raw), entry["dtype"], path.name)


def _check_tensors(
    stored: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    *,
    tied_head: bool,
    folder: Path,
) -> None:
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in stored
    ]
    for name, tensor in stored.items():
        shown = printable(name, _NAME_CHARACTERS)
        if name == "lm_head.weight" and tied_head:  # some checkpoints store the tied head twice
            if "wte.weight" in stored and not _is_equal(tensor, stored["wte.weight"]):
                remedy = "if the model has a head of its own, config.json needs tie_word_embeddings false"
                problems.append(f"left over: lm_head.weight, which is not wte.weight; {remedy}")
        elif name not in shapes:
            problems.append(f"left over: {shown}")
        elif tensor.dtype not in _STORED_DTYPES:
            problems.append(
                f"wrong type: {name} is {printable(tensor.dtype, 20)}, not one of {', '.join(_STORED_DTYPES)}"
            )
        elif tensor.raw.shape != shapes[name]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.raw.shape)}, config.json asks for {list(shapes[name])}"
            )
    if problems:
        told = problems[:40] + (
            [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        )
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes:\n  "
            + "\n  ".join(told)
        )


def _is_equal(one: StoredTensor, other: StoredTensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.raw.shape == other.raw.shape
        and one.raw.tobytes() == other.raw.tobytes()
    )


def _to_float32(tensor: StoredTensor, progress: "tqdm[Any]") -> Float32[np.ndarray, "..."]:
    if tensor.dtype == "F32":
        flat = tensor.raw.reshape(-1).view(np.uint8)
        for start in range(
            0, flat.size, _TOUCH_BYTES
        ):  # read it now, so that the first request does not wait for the disk
            flat[start : start + _TOUCH_BYTES : 4096].max()
            progress.update(min(_TOUCH_BYTES, flat.size - start))
        return np.require(
            tensor.raw, requirements="A"
        )  # a copy where it lies at an odd address: BLAS would make one every time
    progress.update(tensor.raw.nbytes)
    if tensor.dtype == "F16":
        return tensor.raw.astype(np.float32)
    return np.left_shift(tensor.raw, 16, dtype=np.uint32).view(
        np.float32
    )  # bfloat16 is the upper half of a float32
