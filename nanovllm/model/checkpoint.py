"""Safetensors checkpoints in Hugging Face's format, read strictly.

The safetensors library checks the file (header, offsets, size). Tensors are then read one by one,
because the library's NumPy interface cannot read BF16. No file stays memory-mapped: overwriting it
in place would change the weights of a running server, and truncating it would end the process.
Names may have their family's prefix; tensors are in one file or in the shards that
model.safetensors.index.json lists. One error names every missing, unexpected or misshapen tensor.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from safetensors import SafetensorError, safe_open

from nanovllm.errors import CheckpointError, printable
from nanovllm.model.config import ModelConfig, read_json
from nanovllm.model.families.registry import family_of, short_name
from nanovllm.model.weights import Layer, Linear, ModelWeights
from nanovllm.progress import progress_bar

_STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NAME_CHARACTERS = 100
_PIECE_BYTES = 16 << 20  # tensors are compared in pieces of this size


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in its file.

    Attributes:
        offset: position of its first byte in the file.
        identity: of the file, when its header was read.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    identity: tuple[int, ...]

    def read(self) -> Float32[np.ndarray, "..."]:
        """Read the tensor as float32; raise CheckpointError if the file has changed."""
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

    def read_bytes(self, start: int, max_bytes: int) -> UInt8[np.ndarray, " bytes"]:
        """Read up to `max_bytes` from byte `start` of the tensor; raise as `read` does."""
        count = min(max_bytes, self.num_bytes - start)
        with self.path.open("rb") as file:
            content = np.fromfile(file, dtype=np.uint8, count=count, offset=self.offset + start)
            if content.size < count or _identity(file) != self.identity:
                raise CheckpointError(f"{self.path} was changed while it was read; load it again")
        return content


class StoredLayers(Sequence[Layer[Linear]]):
    """The transformer blocks of a checkpoint, each read at every access and not kept."""

    def __init__(self, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
        """Take the tensors of a checked checkpoint."""
        self._config = config
        self._stored = stored

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._config.layers

    def __getitem__(self, index: Any) -> Any:
        """Read a block; slices are not supported."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tensors = family_of(self._config).tensors
        names = [name for name in self._stored if name.startswith(f"{tensors.LAYERS}{index}.")]
        arrays = {name: self._stored[name].read() for name in names}
        return tensors.build_layer(arrays, self._config, index)


def load_weights(folder: Path, config: ModelConfig) -> ModelWeights:
    """Read all weights of a folder as float32.

    Raises:
        CheckpointError: there is no safetensors file, a file is damaged, or tensors are missing,
            unexpected, or of the wrong shape or type.
    """
    return build_tree(load_arrays(folder, config), config)


def load_arrays(folder: Path, config: ModelConfig) -> dict[str, Float32[np.ndarray, "..."]]:
    """Read all weights of a folder as float32, by their names in `expected_shapes`.

    Raises:
        CheckpointError: as `load_weights`.
    """
    stored = _read_checked(folder, config)
    total = sum(tensor.num_bytes for tensor in stored.values())
    arrays: dict[str, np.ndarray] = {}
    with progress_bar(
        total=total, desc="Loading weights", unit="B", unit_scale=True, delay=0.5, leave=False
    ) as progress:
        for name, tensor in stored.items():
            arrays[name] = tensor.read()
            progress.update(tensor.num_bytes)
    return arrays


def open_weights(folder: Path, config: ModelConfig) -> ModelWeights:
    """Read the weights as `load_weights` does, but each block only when it is accessed.

    The blocks are then never in memory as float32 all at once, twice the size of a 16-bit file.
    """
    stored = _read_checked(folder, config)
    layers = family_of(config).tensors.LAYERS
    arrays = {name: tensor.read() for name, tensor in stored.items() if not name.startswith(layers)}
    return build_tree(arrays, config, StoredLayers(config, stored))


def _read_checked(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Return the network's tensors after checking the whole folder."""
    tensors = family_of(config).tensors
    stored = read_tensors(folder)
    shapes = expected_shapes(config)
    _check_tensors(stored, shapes, tensors.EMBEDDING if config.tied_head else "", folder)
    return {name: stored[name] for name in shapes}


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the folder's tensors as stored, by name without the prefix, without buffers."""
    tensors: dict[str, StoredTensor] = {}
    for path in _checkpoint_files(folder):
        for name, tensor in _read_header(path):
            short = short_name(name)
            if short is None:
                continue
            if short in tensors:
                raise CheckpointError(
                    f"{folder}: {printable(short)} is there twice, in {tensors[short].path.name} "
                    f"and in {tensor.path.name}"
                )
            tensors[short] = tensor
    return tensors


def stored_dtype(folder: Path) -> Literal["float32", "bfloat16"]:
    """Return the smallest type of weights that is exact for a checkpoint.

    It is bfloat16 if all tensors are stored in it, otherwise float32.
    """
    dtypes = {tensor.dtype for tensor in read_tensors(folder).values()}
    return "bfloat16" if dtypes == {"BF16"} else "float32"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a checkpoint with this config."""
    shapes: dict[str, tuple[int, ...]] = family_of(config).tensors.expected_shapes(config)
    return shapes


def build_tree(
    arrays: Mapping[str, Float32[np.ndarray, "..."]],
    config: ModelConfig,
    layers: Sequence[Layer[Linear]] | None = None,
) -> ModelWeights:
    """Return the weight tree of a network; without `layers` its blocks are in the arrays too."""
    tensors = family_of(config).tensors
    if layers is None:
        layers = tuple(tensors.build_layer(arrays, config, i) for i in range(config.layers))
    tree: ModelWeights = tensors.build_tree(arrays, config, layers)
    return tree


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
            f"{folder} lacks {len(missing)} of the {len(names)} files that {index.name} lists: "
            f"{', '.join(missing[:5])}"
        )
    return [folder / name for name in names]


def _is_lfs_pointer(path: Path) -> bool:
    """Whether the file is what `git clone` without Git LFS writes in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _is_file(path: Path) -> bool:
    """Whether there is such a file; an impossible name counts as no file."""
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
    """Return a value that differs after the file is replaced or changed."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_tensors(
    stored: dict[str, StoredTensor],
    shapes: dict[str, tuple[int, ...]],
    tied: str,
    folder: Path,
) -> None:
    """Raise CheckpointError unless the tensors are the expected ones.

    `tied` is the embedding that is the head too; "" if the head has weights of its own.
    """
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in shapes.items() if name not in stored
    ]
    for name, tensor in stored.items():
        shown = printable(name, _NAME_CHARACTERS)
        if name == "lm_head.weight" and tied:  # some checkpoints store the tied head twice
            if tied in stored and not tensor.is_equal(stored[tied]):
                problems.append(
                    f"left over: lm_head.weight, which is not {tied}; if the model has a head of "
                    "its own, config.json needs tie_word_embeddings false"
                )
        elif name not in shapes:
            problems.append(f"left over: {shown}")
        elif tensor.dtype not in _STORED_DTYPES:
            problems.append(
                f"wrong type: {name} is {printable(tensor.dtype, 20)}, "
                f"not one of {', '.join(_STORED_DTYPES)}"
            )
        elif tensor.shape != shapes[name]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)}, "
                f"config.json asks for {list(shapes[name])}"
            )
    if problems:
        listed = problems[:40] + (
            [f"... and {len(problems) - 40} more"] if len(problems) > 40 else []
        )
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes:\n  "
            + "\n  ".join(listed)
        )
