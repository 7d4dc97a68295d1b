"""Checkpoints from the hub and from broken disks: the same weights, or a clear error."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import CheckpointError
from nanovllm.model.checkpoint import load_weights, open_weights, stored_dtype
from nanovllm.model.config import GPT2Config
from nanovllm.model.weights import GPT2Weights
from tests.support.checkpoints import (
    tiny_config,
    tiny_tensors,
    with_dtype,
    write_checkpoint,
    write_json,
    write_safetensors,
)

FORMS: dict[str, dict[str, Any]] = {
    "as transformers saves it": {},
    "as the published gpt2": {"prefix": False, "buffers": True, "aligned": False},
    "with buffers": {"buffers": True},
    "in three shards": {"shards": 3},
    "in shards without prefix": {"shards": 2, "prefix": False, "buffers": True},
    "with the tied head stored": {"stored_head": True},
    "untied": {"tied": False},
    "untied without prefix": {"tied": False, "prefix": False},
}


def load(folder: Path) -> GPT2Weights:
    return load_weights(folder, GPT2Config.load(folder))


def by_name(weights: GPT2Weights) -> dict[str, np.ndarray]:
    """The loaded tree by the names of the file, written out a second time."""
    named = {
        "wte.weight": weights.token_embedding, "wpe.weight": weights.position_embedding,
        "lm_head.weight": weights.head,
        "ln_f.weight": weights.final_norm.gain, "ln_f.bias": weights.final_norm.bias,
    }  # fmt: skip
    for index, layer in enumerate(weights.layers):
        for name, norm in (("ln_1", layer.attention_norm), ("ln_2", layer.ffn_norm)):
            named |= {f"h.{index}.{name}.weight": norm.gain, f"h.{index}.{name}.bias": norm.bias}
        for name, linear in (
            ("attn.c_attn", layer.qkv),
            ("attn.c_proj", layer.out),
            ("mlp.c_fc", layer.up),
            ("mlp.c_proj", layer.down),
        ):
            named |= {
                f"h.{index}.{name}.weight": linear.weight,
                f"h.{index}.{name}.bias": linear.bias,
            }
    return named


def leaves(tree: object) -> Iterator[np.ndarray]:
    """Every array of a tree of dataclasses and tuples."""
    if isinstance(tree, np.ndarray):
        yield tree
    elif isinstance(tree, tuple):
        yield from itertools.chain.from_iterable(map(leaves, tree))
    elif is_dataclass(tree):
        yield from itertools.chain.from_iterable(
            leaves(getattr(tree, field.name)) for field in fields(tree)
        )


def expected_tensors(*, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    tensors = tiny_tensors(tiny_config(), seed=seed)
    return tensors | ({"lm_head.weight": tensors["wte.weight"]} if tied else {})


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """A plain checkpoint whose tensors were changed on the way into the file."""
    write_checkpoint(folder)
    tensors = tiny_tensors(tiny_config())
    del tensors["lm_head.weight"]
    change(tensors)
    write_safetensors(
        folder / "model.safetensors", {name: with_dtype(array) for name, array in tensors.items()}
    )
    return folder


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to 8 significant bits, ties to even, by arithmetic instead of bit patterns."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    rounded: np.ndarray = np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    return rounded


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(tmp_path: Path, form: str) -> None:
    weights = load(write_checkpoint(tmp_path, **FORMS[form]))
    expected = expected_tensors(tied=FORMS[form].get("tied", True))
    loaded = by_name(weights)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name, strict=True)
    assert (weights.head is weights.token_embedding) == FORMS[form].get("tied", True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [("F16", lambda array: array.astype(np.float16).astype(np.float32)), ("BF16", to_bfloat16)],
)
def test_smaller_types_are_widened_exactly(
    tmp_path: Path, form: str, dtype: str, rounded: Callable[[np.ndarray], np.ndarray]
) -> None:
    loaded = by_name(load(write_checkpoint(tmp_path, **FORMS[form], dtype=dtype)))
    for name, array in expected_tensors(tied=FORMS[form].get("tied", True)).items():
        np.testing.assert_array_equal(loaded[name], rounded(array), err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_weights_suit_the_arithmetic(tmp_path: Path, dtype: str, *, aligned: bool) -> None:
    """An array at an odd address would be copied whole by every product."""
    for array in leaves(load(write_checkpoint(tmp_path, dtype=dtype, aligned=aligned))):
        assert array.dtype == np.float32
        assert array.flags.aligned
        assert array.flags.c_contiguous


@pytest.mark.parametrize("change", ["overwritten", "cut short"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_loaded_does_not_depend_on_the_file(
    tmp_path: Path, dtype: str, change: str
) -> None:
    """A mapped file that is cut short would end this process."""
    path = write_checkpoint(tmp_path, dtype=dtype) / "model.safetensors"
    weights = load(tmp_path)
    before = [array.copy() for array in leaves(weights)]
    with path.open("r+b") as file:
        if change == "overwritten":
            file.write(bytes(path.stat().st_size))
        else:
            file.truncate(0)
    for array, expected in zip(leaves(weights), before, strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", "float32"), ("F16", "float32"), ("BF16", "bfloat16")]
)
def test_the_type_that_holds_the_stored_numbers(tmp_path: Path, stored: str, dtype: str) -> None:
    assert stored_dtype(write_checkpoint(tmp_path, dtype=stored)) == dtype


def test_blocks_can_be_read_one_at_a_time(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dtype="BF16", shards=2)
    opened = open_weights(folder, GPT2Config.load(folder))
    whole = by_name(load(folder))
    for name, array in by_name(opened).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert opened.layers[0] is not opened.layers[0]
    with pytest.raises(IndexError):
        opened.layers[len(opened.layers)]


@pytest.mark.parametrize("change", ["overwritten", "cut short", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    opened = open_weights(tmp_path, GPT2Config.load(tmp_path))
    content = path.read_bytes()
    os.utime(path, ns=(0, 0))  # so that a change within the clock's resolution shows too
    opened_before = open_weights(tmp_path, GPT2Config.load(tmp_path))
    if change == "replaced":
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(path)
    else:
        path.write_bytes(content if change == "overwritten" else content[:-1])
    for weights in (opened, opened_before):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors was changed while it was read"
        ):
            list(weights.layers)


def test_nothing_is_printed_where_nobody_watches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(write_checkpoint(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_all_faults_are_listed_in_one_error(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["h.0.ln_1.bias"], tensors["wpe.weight"]
        tensors["h.7.mlp.c_fc.bias"] = np.zeros(3, dtype=np.float32)
        tensors["score.weight"] = np.zeros((2, 32), dtype=np.float32)
        tensors["h.1.attn.c_attn.weight"] = tensors["h.1.attn.c_attn.weight"].T.copy()
        tensors["ln_f.weight"] = np.zeros((), dtype=np.float32)
        tensors["h.1.ln_2.bias"] = np.zeros(32, dtype=np.int64)

    with pytest.raises(CheckpointError) as caught:
        load(rewrite(tmp_path, spoil))
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "left over: h.7.mlp.c_fc.bias",
        "left over: score.weight",
        "missing: h.0.ln_1.bias [32]",
        "missing: wpe.weight [128, 32]",
        "wrong shape: h.1.attn.c_attn.weight is [96, 32], config.json asks for [32, 96]",
        "wrong shape: ln_f.weight is [], config.json asks for [32]",
        "wrong type: h.1.ln_2.bias is I64, not one of F32, F16, BF16",
    ]


@pytest.mark.parametrize(
    ("n_layer", "says"),
    [(3, "missing: h.2.attn.c_attn.weight"), (1, "left over: h.1.attn.c_attn.weight")],
)
def test_another_number_of_layers(tmp_path: Path, n_layer: int, says: str) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", tiny_config(n_layer=n_layer))
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_a_very_long_list_is_cut(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", tiny_config(n_layer=200))
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 10_000


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load(write_checkpoint(tmp_path, tied=False, stored_head=False))


def test_a_stored_head_that_is_not_the_tied_one_is_not_dropped(tmp_path: Path) -> None:
    """config.json says tied (the default) but the file has another head: transformers 5 uses it."""
    head = expected_tensors(tied=False)["lm_head.weight"]
    folder = rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    try:
        loaded = load(folder).head
    except CheckpointError as error:
        assert "lm_head.weight" in str(error)  # noqa: PT017
        return
    np.testing.assert_array_equal(loaded, head)


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"wte\.weight is there twice"):
        load(
            rewrite(
                tmp_path,
                lambda tensors: tensors.update({"transformer.wte.weight": tensors["wte.weight"]}),
            )
        )


def test_a_tensor_that_is_in_two_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError,
        match=(
            r"twice, in model-00001-of-00002\.safetensors "
            r"and in model-00002-of-00002\.safetensors"
        ),
    ):
        load(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 2000, -1000, -4, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_truncated_file_is_named(tmp_path: Path, size: int, shards: int) -> None:
    write_checkpoint(tmp_path, shards=shards)
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=path.name):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        b"PK\x03\x04" + bytes(500),
    ],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = (
        write_checkpoint(tmp_path_factory.mktemp("flipped"), config={"n_layer": 1})
        / "model.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[int(place * (8 + int.from_bytes(content[:8], "little")))] ^= 1 << bit
    path.write_bytes(content)
    try:
        weights = load(path.parent)
    except CheckpointError:
        return
    assert all(array.dtype == np.float32 for array in leaves(weights))


def test_names_from_a_file_are_short_and_printable(tmp_path: Path) -> None:
    names = ("\x1b[31m", "transformer.\x1b[31m", "\u202e" * 10_000, "x" * 10_000)

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: np.zeros(3, dtype=np.float32) for name in names[2:]})

    with pytest.raises(CheckpointError) as left_over:
        load(rewrite(tmp_path / "one", spoil))
    with pytest.raises(CheckpointError) as twice:
        load(
            rewrite(
                tmp_path / "two",
                lambda tensors: tensors.update(
                    {name: np.zeros(3, dtype=np.float32) for name in names[:2]}
                ),
            )
        )
    folder = write_checkpoint(tmp_path / "three", shards=2)
    index = {"weight_map": {"wte.weight": "\x1b" * 10_000}}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError) as missing:
        load(folder)
    for caught, says in ((left_over, "left over"), (twice, "is there twice"), (missing, "lacks 1")):
        message = str(caught.value).replace(str(tmp_path), "")
        assert says in message
        assert message.replace("\n", "").isprintable()
        assert len(message) < 1000


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 548105171\n",
        encoding="utf-8",
    )
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer, .*git lfs pull"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "weight_map"),
        ([], "must hold an object"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["model-00001-of-00002.safetensors"]}, "weight_map"),
        ({"weight_map": {"wte.weight": 1}}, "weight_map"),
        (
            {"weight_map": {"wte.weight": "model-00009-of-00009.safetensors"}},
            r"lacks 1 of the 1 files.*model-00009-of-00009\.safetensors",
        ),
        ({"weight_map": {"wte.weight": ""}}, "lacks"),
        ({"weight_map": {"wte.weight": ".."}}, "lacks"),
        ({"weight_map": {"wte.weight": "config.json"}}, r"config\.json is damaged"),
    ],
)
def test_a_bad_index(tmp_path: Path, index: object, says: str) -> None:
    write_json(write_checkpoint(tmp_path, shards=2) / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/model.safetensors",
        "sub/../../elsewhere/model.safetensors",
        "..\\elsewhere\\model.safetensors",
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "elsewhere")
    folder = write_checkpoint(tmp_path / "model", shards=2)
    for path in (name, str(tmp_path / "elsewhere" / "model.safetensors")):
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"wte.weight": path}})
        with pytest.raises(CheckpointError, match="outside its own folder"):
            load(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors"):
        load(tmp_path)


def test_a_folder_with_a_pickle_only(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*converted to safetensors"):
        load(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        load(tmp_path)
