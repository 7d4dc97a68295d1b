"""Safetensors checkpoints in Hugging Face's GPT-2 format, read strictly.

The safetensors library checks the file (header, offsets, size); tensors are then read one by one
into memory of their own, which the library's NumPy interface cannot do for BF16. Nothing stays
mapped: a file that is overwritten in place would otherwise change the weights that are served, and
one that is cut short would end the process. Names come with or without the `transformer.` prefix,
in one file or in shards listed by model.safetensors.index.json. Whatever is missing, left over or
of the wrong shape is collected into one error.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError, safe_open

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
from nanovllm.progress import progress_bar

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
_PIECE_BYTES = 16 << 20  # of two tensors that are compared


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in its file.

    Attributes:
        offset: of its first byte in the file.
        identity: the file's, when its header was read.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    identity: tuple[int, ...]

    def read(self) -> Float32[np.ndarray, "..."]:
        """Read it and widen it to float32; raises CheckpointError where the file has changed since."""
        dtype = _STORED_DTYPES[self.dtype]
        raw = self.read_bytes(0, self.num_bytes).view(dtype).reshape(self.shape)
        if self.dtype == "BF16":  # the upper half of a float32
            return np.left_shift(raw, 16, dtype=np.uint32).view(np.float32)
        return raw.astype(np.float32, copy=False)

    def is_equal(self, other: "StoredTensor") -> bool:
        """Whether the other tensor has the same type, shape and bytes."""
        return (self.dtype, self.shape) == (other.dtype, other.shape) and all(
            np.array_equal(
                self.read_bytes(start, _PIECE_BYTES), other.read_bytes(start, _PIECE_BYTES)
            )
            for start in range(0, self.num_bytes, _PIECE_BYTES)
        )

    def read_bytes(self, start: int, most: int) -> UInt8[np.ndarray, " bytes"]:
        """Read up to `most` of its bytes from byte `start` on; raises as `read` does."""
        count = min(most, self.num_bytes - start)
        with self.path.open("rb") as file:
            content = np.fromfile(file, dtype=np.uint8, count=count, offset=self.offset + start)
            if content.size < count or _identity(file) != self.identity:
                raise CheckpointError(f"{self.path} was changed while it was read; load it again")
        return content


class StoredLayers(Sequence[Layer]):
    """Transformer blocks that are read from their files whenever they are asked for, and not kept."""

    def __init__(self, config: GPT2Config, stored: Mapping[str, StoredTensor]) -> None:
        """The blocks of a checkpoint that has been checked."""
        self._config = config
        self._stored = stored

    def __len__(self) -> int:
        """How many there are."""
        return self._config.layers

    def __getitem__(self, index: Any) -> Any:
        """Read one block; slices are not supported."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        names = [name for name in self._stored if name.startswith(f"h.{index}.")]
        return build_layer({name: self._stored[name].read() for name in names}, index)


def load_weights(folder: Path, config: GPT2Config) -> GPT2Weights:
    """Read all of the folder's weights as float32.

    Raises:
        CheckpointError: no safetensors, a damaged file, or tensors missing, left over, of the wrong shape or type.
    """
    stored = _read_checked(folder, config)
    total = sum(tensor.num_bytes for tensor in stored.values())
    arrays: dict[str, np.ndarray] = {}
    with progress_bar(
        total=total, desc="Loading weights", unit="B", unit_scale=True, leave=False
    ) as progress:
        for name, tensor in stored.items():
            arrays[name] = tensor.read()
            progress.update(tensor.num_bytes)
    layers = tuple(build_layer(arrays, index) for index in range(config.layers))
    return build_tree(arrays, layers, config)


def open_weights(folder: Path, config: GPT2Config) -> GPT2Weights:
    """Read the folder's weights as `load_weights` does, but each block only when it is asked for.

    So the blocks are never all in memory as float32, which may be twice what their files hold.
    """
    stored = _read_checked(folder, config)
    arrays = {name: tensor.read() for name, tensor in stored.items() if not name.startswith("h.")}
    return build_tree(arrays, StoredLayers(config, stored), config)


def _read_checked(folder: Path, config: GPT2Config) -> dict[str, StoredTensor]:
    """The tensors that the network has, once all of them are known to be right."""
    stored = read_tensors(folder)
    shapes = expected_shapes(config)
    _check_tensors(stored, shapes, tied_head=config.tied_head, folder=folder)
    return {name: stored[name] for name in shapes}


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by its name without the prefix, as stored; causal-mask buffers left out."""
    found: dict[str, StoredTensor] = {}
    for path in _checkpoint_files(folder):
        for name, tensor in _read_header(path):
            short = name.removeprefix(_PREFIX)
            if short in found:
                raise CheckpointError(
                    f"{folder}: {printable(short)} is there twice, in {found[short].path.name} "
                    f"and in {tensor.path.name}"
                )
            if not _BUFFERS.fullmatch(short):
                found[short] = tensor
    return found


def stored_dtype(folder: Path) -> Literal["float32", "bfloat16"]:
    """Return the smallest type of weights that holds every number of a checkpoint exactly.

    That is bfloat16 where all tensors are stored in it. float16 is widened to float32.
    """
    dtypes = {tensor.dtype for tensor in read_tensors(folder).values()}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


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


def build_layer(arrays: Mapping[str, Float32[np.ndarray, "..."]], index: int) -> Layer:
    """The arrays of one block."""

    def linear(name: str) -> Linear:
        return Linear(arrays[f"h.{index}.{name}.weight"], arrays[f"h.{index}.{name}.bias"])

    def norm(name: str) -> LayerNorm:
        return LayerNorm(arrays[f"h.{index}.{name}.weight"], arrays[f"h.{index}.{name}.bias"])

    return Layer(
        attention_norm=norm("ln_1"),
        attention=AttentionWeights(linear("attn.c_attn"), linear("attn.c_proj")),
        ffn_norm=norm("ln_2"),
        ffn=FeedForwardWeights(linear("mlp.c_fc"), linear("mlp.c_proj")),
    )


def build_tree(
    arrays: Mapping[str, Float32[np.ndarray, "..."]], layers: Sequence[Layer], config: GPT2Config
) -> GPT2Weights:
    """The blocks, and the arrays of `expected_shapes` around them, as the tree that the forward pass walks."""
    head = arrays["wte.weight"] if config.tied_head else arrays["lm_head.weight"]
    final_norm = LayerNorm(arrays["ln_f.weight"], arrays["ln_f.bias"])
    return GPT2Weights(arrays["wte.weight"], arrays["wpe.weight"], layers, final_norm, head)


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


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with path.open("rb") as file:
        identity = _identity(file)
        try:
            with safe_open(path, framework="numpy"):
                pass  # opening checks the header, every offset and the file's size
        except (SafetensorError, OSError) as error:
            if _is_lfs_pointer(path):
                raise CheckpointError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that "
                    "folder, or fetch the model by `nanovllm download`"
                ) from None
            raise CheckpointError(
                f"{path} is damaged or incomplete ({path.stat().st_size} bytes): "
                f"{printable(str(error))}; fetch it again"
            ) from None
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            offset, shape = 8 + header_bytes + start, tuple(entry["shape"])
            yield name, StoredTensor(path, entry["dtype"], shape, offset, stop - start, identity)


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """What tells a file from another that takes its place, and from itself after a change."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


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
            if "wte.weight" in stored and not tensor.is_equal(stored["wte.weight"]):
                remedy = "if the model has a head of its own, config.json needs tie_word_embeddings false"
                problems.append(f"left over: lm_head.weight, which is not wte.weight; {remedy}")
        elif name not in shapes:
            problems.append(f"left over: {shown}")
        elif tensor.dtype not in _STORED_DTYPES:
            problems.append(
                f"wrong type: {name} is {printable(tensor.dtype, 20)}, not one of {', '.join(_STORED_DTYPES)}"
            )
        elif tensor.shape != shapes[name]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)}, config.json asks for {list(shapes[name])}"
            )
    if problems:
        told = problems[:40] + (
            [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        )
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes:\n  "
            + "\n  ".join(told)
        )
