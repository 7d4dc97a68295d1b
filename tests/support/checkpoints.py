"""Tiny checkpoints in every form they are found in, made from a seed with NumPy alone.

The numbers are those of `nanovllm.learn.tiny_model`, the same everywhere. So a checkpoint has the
same bytes on every machine, and values recorded from the reference implementation stay valid
(tests/reference). The file format
(https://github.com/huggingface/safetensors#format) is written by hand, because the library's writer
cannot write bfloat16 without torch, tensors at odd addresses, or headers that are wrong on purpose.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovllm.learn.tiny_model import draw_tensors
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.families.registry import family_of, load_config, read_config
from nanovllm.model.weights import ModelWeights
from tests.support.families import CONFIGS, draw_family_tensors

OUTLIER_CHANNELS = {5: 1100.0, 21: -700.0, 50: -400.0}
"""{residual channel: its size from the first block on} with `outliers`; the mean stays small."""

MERGES = ("t h", "th e", "i n", "Ġ the", "Ġ a", "e r", "o n", "Ġ t", "l l", "Ġ w")
END_OF_TEXT = "<|endoftext|>"

_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "bool": "BOOL"}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """Return the config.json of a network with two small blocks; `...` removes a key.

    It is a GPT-2, or of the family of `model_type`.
    """
    family: dict[str, Any] = CONFIGS.get(overrides.get("model_type", "gpt2"), {})
    config: dict[str, Any] = family or {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 97,
        "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    return {key: value for key, value in {**config, **overrides}.items() if value is not ...}


def tiny_tensors(
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    outliers: bool = False,
    scales: Mapping[str, float] | None = None,
    shifts: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Return every float32 tensor of a model by its name without prefix, also `lm_head.weight`.

    Weights are so large that the predictions are far from uniform. With `outliers` a few channels
    of the residual stream reach about 1e3, as in the published GPT-2. Tensors whose names end in a
    key of `scales` are multiplied by its value; that of `shifts` is added.
    """
    if config["model_type"] in CONFIGS:
        tensors = draw_family_tensors(config, seed)
    else:
        tensors = draw_tensors(config, seed)
    if outliers:
        _add_outliers(tensors, config)
    for name in tensors:
        for suffix, factor in (scales or {}).items():
            tensors[name] *= np.float32(factor if name.endswith(suffix) else 1)
        for suffix, shift in (shifts or {}).items():
            tensors[name] += np.float32(shift if name.endswith(suffix) else 0)
    return tensors


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: str = "F32",
    prefix: bool = True,
    shards: int = 1,
    buffers: bool = False,
    tied: bool = True,
    stored_head: bool | None = None,
    aligned: bool = True,
    outliers: bool = False,
    scales: Mapping[str, float] | None = None,
    shifts: Mapping[str, float] | None = None,
) -> Path:
    """Write config.json and the weights of a tiny network into `folder` and return it.

    Args:
        config: what differs from `tiny_config`.
        dtype: "F32", "F16" or "BF16", of all weights in the file.
        prefix: names have the prefix that transformers gives them; those of gpt2 have none.
        shards: number of files; above 1 an index names them.
        buffers: the causal masks that old versions stored beside the weights.
        tied: the head is the token embedding; otherwise it has weights of its own.
        stored_head: `lm_head.weight` is in the file, by default where it is not tied.
        aligned: tensors begin at multiples of 4 bytes; in the published gpt2 they do not.
        outliers, scales, shifts: see `tiny_tensors`.
    """
    full_config = tiny_config(**{"tie_word_embeddings": tied, **(config or {})})
    tensors = tiny_tensors(full_config, seed=seed, outliers=outliers, scales=scales, shifts=shifts)
    tensors_of = family_of(read_config(full_config)).tensors
    if tied:
        tensors["lm_head.weight"] = tensors[tensors_of.EMBEDDING]
    if not (not tied if stored_head is None else stored_head):
        del tensors["lm_head.weight"]
    encoded = {name: _encode(array, dtype) for name, array in tensors.items()}
    if buffers:
        encoded.update(_mask_buffers(full_config))
    named = {
        tensors_of.PREFIX + name if prefix and name != "lm_head.weight" else name: tensor
        for name, tensor in encoded.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", full_config)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", named, aligned=aligned)
    else:
        write_shards(folder, named, shards)
    return folder


def write_tiny_model(folder: Path, *, tokenizer: str = "tokenizer.json", **options: Any) -> Path:
    """Write a folder that can be served: a checkpoint, and a byte-level tokenizer for it."""
    names = write_tokenizer(folder, tokenizer)
    end = names.index(END_OF_TEXT)
    defaults = {"vocab_size": len(names), "bos_token_id": end, "eos_token_id": end}
    return write_checkpoint(
        folder, **{**options, "config": {**defaults, **(options.get("config") or {})}}
    )


def write_tokenizer(folder: Path, form: str = "tokenizer.json") -> list[str]:
    """Write a byte-level BPE tokenizer with a few merges and return its vocabulary.

    `form` is "tokenizer.json", or "vocab.json" (with merges.txt). Token ids 0 to 255 are single
    bytes in the order of the byte alphabet; the end-of-text token is the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    names = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(left + right for left, right in merges),
        END_OF_TEXT,
    ]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    if form == "vocab.json":
        write_json(folder / "vocab.json", vocab)
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8"
        )
        return names
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return names


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, np.ndarray]], *, aligned: bool = True
) -> None:
    """Write {name: (dtype, bytes)}; unaligned, the first tensor is 3 bytes past a multiple of 4."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8 + (0 if aligned else 3))
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, array in tensors.values():
            file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())


def write_shards(folder: Path, tensors: Mapping[str, tuple[str, np.ndarray]], shards: int) -> None:
    """Write the tensors in turn into `shards` files, and the index."""
    weight_map = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        write_safetensors(folder / file_name, part)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(array.nbytes for _, array in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hash_folder(folder: Path) -> str:
    """One SHA-256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def with_dtype(array: np.ndarray) -> tuple[str, np.ndarray]:
    """The pair that `write_safetensors` takes, for an array of a type NumPy has."""
    return _DTYPE_NAMES[array.dtype.name], array


def _add_outliers(tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """Enlarge a few channels after the first block; later layer norms restore the others' size."""
    d_model = config["n_embd"]
    channels = list(OUTLIER_CHANNELS)
    tensors["h.0.mlp.c_proj.weight"][:, channels] *= np.float32(5)
    tensors["h.0.mlp.c_proj.bias"][channels] += np.asarray(
        list(OUTLIER_CHANNELS.values()), dtype=np.float32
    )
    shrinkage = (sum(size**2 for size in OUTLIER_CHANNELS.values()) / d_model) ** 0.5
    gains = np.full(d_model, shrinkage / 4, dtype=np.float32)
    gains[channels] = 0.5
    for layer in range(1, config["n_layer"]):
        tensors[f"h.{layer}.ln_1.weight"] *= gains
        tensors[f"h.{layer}.ln_2.weight"] *= gains
    tensors["ln_f.weight"] *= gains


def _mask_buffers(config: Mapping[str, Any]) -> dict[str, tuple[str, np.ndarray]]:
    """`attn.bias`, the causal mask in the weights' type, and `attn.masked_bias`, one number."""
    positions = config["n_positions"]
    mask = np.tril(np.ones((1, 1, positions, positions), dtype=np.float32))
    number = np.asarray(-1e4, dtype=np.float32)
    parts = {"bias": with_dtype(mask), "masked_bias": with_dtype(number)}
    return {
        f"h.{layer}.attn.{part}": tensor
        for layer in range(config["n_layer"])
        for part, tensor in parts.items()
    }


def _encode(array: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """Round to a file's type, to nearest even; bfloat16 is the upper half of float32."""
    if dtype != "BF16":
        return dtype, array.astype({"F32": np.float32, "F16": np.float16}[dtype])
    whole = array.view(np.uint32).astype(np.uint64)
    return dtype, (
        (whole + np.uint64(0x7FFF) + ((whole >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    ).astype(np.uint16)


def load(folder: Path) -> ModelWeights:
    """Return the weights of a checkpoint."""
    return load_weights(folder, load_config(folder))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Write a plain checkpoint whose tensors were changed on the way into the file."""
    write_checkpoint(folder)
    tensors = tiny_tensors(tiny_config())
    del tensors["lm_head.weight"]
    change(tensors)
    write_safetensors(
        folder / "model.safetensors", {name: with_dtype(array) for name, array in tensors.items()}
    )
    return folder
